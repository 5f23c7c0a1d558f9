"""Tiny readers of every type in docs/models.md, with random weights, as folders on disk.

Their configurations are those of published models, but for widths, layers and vocabulary.
"""

from pathlib import Path

import torch
import transformers

from tests import published, small_tokenizers

SHRUNK = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "embedding_size": 8,
    "attention_head_size": 8,
    # Weights are large enough to matter.
    "initializer_range": 0.3,
}


def make(name: str = "bert", *, seed: int = 0, layers: int = 2, head: bool = True, **own):
    """A tiny model, and a tokenizer of its family. name: of `published`, or a model type."""
    model = published.named(name)
    tokenizer = small_tokenizers.of_family(model.tokenizer)
    sizes = {
        key: value
        for key, value in SHRUNK.items()
        if key in model.config or key not in ("embedding_size", "attention_head_size")
    }
    values = {
        "pad_token_id": tokenizer.pad_token_id,
        **model.config,
        **sizes,
        "vocab_size": len(tokenizer),
        "num_hidden_layers": layers,
        **own,
    }
    names = published.NAMES.get(model.model_type, {})
    config = transformers.AutoConfig.for_model(
        model.model_type, **{names.get(key, key): value for key, value in values.items()}
    )
    torch.manual_seed(seed)
    auto = transformers.AutoModelForQuestionAnswering if head else transformers.AutoModel
    return auto.from_config(config).eval(), tokenizer


def save(folder: Path, name: str = "bert", **arguments) -> str:
    """A tiny reader saved into `folder`; returns its name as a program takes it."""
    model, tokenizer = make(name, **arguments)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def ids_of(model, lengths=(23, 17)):
    """Random token ids padded to the longest, and the mask of the real ones."""
    draw = torch.Generator().manual_seed(1)
    width = max(lengths)
    ids = torch.randint(5, model.config.vocab_size, (len(lengths), width), generator=draw)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, model.config.pad_token_id), mask
