"""Tiny readers of every supported type, with random weights, as folders on disk."""

from pathlib import Path

import torch
import transformers

from tests import tokenizers

RELATIVE = {"relative_attention": True}
# Model type -> (configuration class, tokenizer family, arguments of its own).
TYPES = {
    "albert": ("AlbertConfig", "bert", {"embedding_size": 8}),
    "bert": ("BertConfig", "bert", {}),
    "camembert": ("CamembertConfig", "xlm_roberta", {}),
    "deberta": (
        "DebertaConfig",
        "deberta",
        {"relative_attention": True, "pos_att_type": "c2p|p2c"},
    ),
    "deberta-v2": ("DebertaV2Config", "deberta_v2", RELATIVE),
    "electra": ("ElectraConfig", "bert", {"embedding_size": 8}),
    "mpnet": ("MPNetConfig", "roberta", {}),
    "roberta": ("RobertaConfig", "roberta", {}),
    "xlm-roberta": ("XLMRobertaConfig", "xlm_roberta", {}),
}


def make(model_type: str = "bert", *, seed: int = 0, layers: int = 2, head: bool = True, **own):
    """A tiny model of a type, and its family's tokenizer. Weights are large enough to matter."""
    class_name, family, arguments = TYPES[model_type]
    tokenizer = tokenizers.of_family(family)
    config = getattr(transformers, class_name)(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 402,
            "type_vocab_size": 2 if family in ("bert", "deberta", "deberta_v2") else 1,
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": 0.3,
            **arguments,
            **own,
        }
    )
    torch.manual_seed(seed)
    auto = transformers.AutoModelForQuestionAnswering if head else transformers.AutoModel
    return auto.from_config(config).eval(), tokenizer


def save(folder: Path, model_type: str = "bert", **arguments) -> str:
    """A tiny reader saved into `folder`; returns its name as a program takes it."""
    model, tokenizer = make(model_type, **arguments)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
