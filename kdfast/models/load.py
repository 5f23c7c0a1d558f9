"""Readers: how they are loaded, cut down to some layers, and called."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForQuestionAnswering, PreTrainedTokenizerFast

from kdfast.common.errors import UserError
from kdfast.models.checks import (
    check_reads_both_ways,
    check_sizes,
    check_type,
)
from kdfast.models.hub import local_folder, without_safetensors
from kdfast.tokenizers.load import load_tokenizer

# Of what torch.compile is given every width is a multiple: the tensor cores of a V100 take
# half-precision products whose sizes are multiples of 8, and a compiled kernel its widest loads.
COMPILED_WIDTH = 8


class SpanModel(nn.Module):
    """A Hugging Face question-answering model that returns its logits as one tensor.

    It is what teaches, what trains and what is evaluated. Dropout of `embeds_dropout_prob` stands
    between the encoder and the head, as in Haystack; the head runs in the precision of its weights
    under autocast too, so that half precision never rounds the logits.
    """

    def __init__(self, reader: nn.Module, embeds_dropout_prob: float = 0.0):
        super().__init__()
        self.reader = reader
        self.dropout = nn.Dropout(embeds_dropout_prob)
        self.takes_4d_mask = reader.config._attn_implementation == "sdpa"
        # RoBERTa has one type only, published DeBERTas and MPNet none, whatever a tokenizer gives.
        types = getattr(reader.base_model.embeddings, "token_type_embeddings", None)
        self.takes_token_types = types is not None and types.num_embeddings > 1

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (B, L, 2), start and end, in the type of the head's weights.

        input_ids: int64 (B, L). attention_mask: bool (B, L), True for real tokens, or None where
        nothing is padding. token_type_ids: int64 (B, L), 0 or 1, or None for all 0; a model without
        embeddings for two types never gets them.
        """
        hidden = self._encode(input_ids, attention_mask, token_type_ids)[0]
        head = self.reader.qa_outputs
        with torch.autocast(hidden.device.type, enabled=False):
            return head(self.dropout(hidden.to(head.weight.dtype)))

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The embeddings, then what each layer makes of them: layers + 1 tensors (B, L, width).

        Arguments as forward's.
        """
        return self._encode(
            input_ids, attention_mask, token_type_ids, output_hidden_states=True
        ).hidden_states

    def _encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        output_hidden_states: bool = False,
    ):
        """What transformers' encoder returns."""
        if self.takes_4d_mask and attention_mask is not None:
            # transformers passes a 4-D mask on as it is; a 2-D one makes it read the device.
            attention_mask = attention_mask[:, None, None, :]
        elif not self.takes_4d_mask:
            # DeBERTa makes a mask itself, but looks for padding first: that reads the device. The
            # convolution of DeBERTa-v2-xlarge subtracts it from 1, which bools cannot.
            attention_mask = (
                torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
            )
        kwargs = {}
        if token_type_ids is not None and self.takes_token_types:
            kwargs["token_type_ids"] = token_type_ids
        return self.reader.base_model(
            input_ids,
            attention_mask=attention_mask,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )

    def cast_linear_layers(self, dtype: torch.dtype) -> None:
        """Keep the encoder's linear layers in `dtype`, in place, for a model that no longer trains.

        Under autocast to `dtype` the logits stay the same to the bit, and no call casts weights.
        """
        for module in self.reader.base_model.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)

    def enable_gradient_checkpointing(self) -> None:
        """Gradient checkpointing: each layer's inside is computed anew in the backward pass."""
        if not self.reader.supports_gradient_checkpointing:
            raise UserError(
                f"--gradient_checkpointing: {self.reader.config.model_type} has none in "
                "transformers: leave the flag out."
            )
        # Its name since transformers 5.24, and before.
        enable = getattr(self.reader, "activation_checkpointing_enable", None)
        (enable or self.reader.gradient_checkpointing_enable)({"use_reentrant": False})

    def compiled(self, backend: str = "inductor") -> Callable[..., torch.Tensor]:
        """forward() by torch.compile, for any number and width of windows with few compilations."""
        return torch.compile(self, dynamic=True, backend=backend)


@dataclass
class Loaded:
    """A model with its tokenizer; `notes` are sentences that a program should say aloud."""

    model: SpanModel
    tokenizer: PreTrainedTokenizerFast
    notes: list[str] = field(default_factory=list)


def load_reader(
    name: str,
    role: str,
    *,
    new_head_seed: int | None = None,
    embeds_dropout_prob: float = 0.0,
    tokenizer: Any = None,
) -> Loaded:
    """Load folder or hub id `name` in fp32, whatever the checkpoint's type.

    tokenizer: instead of the folder's. new_head_seed: seed of a fresh span head for a model that
    has none; None refuses such a model.
    Raises UserError for a folder that holds no usable model of a supported type.
    """
    folder = local_folder(name, role)
    config = load_config(folder, name, role)
    if not any(folder.glob("*.safetensors")):
        raise without_safetensors(folder, name, role)
    try:
        check_sizes(config, folder, name, role)
        reader, info = AutoModelForQuestionAnswering.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,  # unset, transformers asks on the terminal
            output_loading_info=True,
        )
        with torch.inference_mode():  # a config.json may load and yet compute nothing
            ids = torch.zeros((1, 2), dtype=torch.int64)
            reader(ids, attention_mask=torch.ones_like(ids))
    except UserError:
        raise
    except Exception as error:  # safetensors and transformers share no base class for these
        raise _does_not_load(name, role, error) from error
    notes = []
    missing = sorted(info["missing_keys"])
    encoder_missing = [key for key in missing if not key.startswith("qa_outputs.")]
    if encoder_missing:
        raise UserError(
            f"{role} {name} lacks {len(encoder_missing)} of its encoder's weights, such as "
            f"{encoder_missing[0]}: name a complete model."
        )
    if missing:
        if new_head_seed is None:
            raise UserError(
                f"{role} {name} has no question-answering head: fine-tune it first with "
                "python -m kdfast.train --distillation_loss_weight 0."
            )
        reset_head(reader, new_head_seed)
        notes.append(f"{name} has no question-answering head: a new one is drawn from the seed.")
    if reader.config._attn_implementation != "sdpa":
        notes.append(f"{config.model_type} has no SDPA attention here: eager attention is used.")
    model = SpanModel(reader, embeds_dropout_prob)
    if tokenizer is None:
        tokenizer = load_tokenizer(folder, role)
    return Loaded(model, tokenizer, notes)


def load_config(folder: Path, name: str, role: str):
    """The configuration in `folder`. Raises UserError unless it is of a supported reader."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a broken file, or a type that transformers does not know
        raise _does_not_load(name, role, error) from error
    check_type(config, name, role)
    check_reads_both_ways(config, name, role)
    # A config.json may name attention code on the hub, which would be fetched and run.
    config._attn_implementation = None
    # Switches of what transformers returns, and how: save_pretrained refuses some of them, and
    # feed-forward chunks fail at every width that they do not divide.
    config.output_attentions = config.output_hidden_states = False
    config.return_dict = True
    config.chunk_size_feed_forward = 0
    return config


def _does_not_load(name: str, role: str, error: Exception) -> UserError:
    return UserError(
        f"{role} {name} does not load ({first_line(error)}): name a folder with a "
        "config.json and the weights in safetensors."
    )


def reset_head(reader: nn.Module, seed: int) -> None:
    """Draw the span head anew, from `seed` alone: normal weights as in BERT, zero bias."""
    draw = torch.Generator().manual_seed(seed)
    head = reader.qa_outputs
    with torch.no_grad():
        head.weight.normal_(0.0, reader.config.initializer_range, generator=draw)
        head.bias.zero_()


def keep_layers(loaded: Loaded, layers: list[int], name: str) -> None:
    """Keep only `layers` (rising, counted from 0) of the encoder, in place.

    Embeddings and head stay. Raises UserError where the model has no such layers.
    """
    reader = loaded.model.reader
    stack = getattr(reader.base_model.encoder, "layer", None)
    if stack is None:
        raise UserError(
            f"--student_layers: {name} ({reader.config.model_type}) shares one layer "
            "throughout: name a --student of its own."
        )
    if layers[-1] >= len(stack):
        raise UserError(
            f"--student_layers names layer {layers[-1]}, and {name} has layers "
            f"0 to {len(stack) - 1}."
        )
    reader.base_model.encoder.layer = nn.ModuleList(stack[index] for index in layers)
    reader.config.num_hidden_layers = len(layers)  # every module's: they share it
    loaded.notes.append(f"The student keeps layers {layers} of {name}.")


def check_fits(loaded: Loaded, max_seq_length: int, name: str) -> None:
    """Raise UserError where the model has too few position or token embeddings."""
    longest = longest_input(loaded, name)
    if max_seq_length > longest:
        raise UserError(
            f"--max_seq_length is {max_seq_length}, and {name} reads {longest} tokens at most: "
            "give a smaller one."
        )


def longest_input(loaded: Loaded, name: str) -> int:
    """The most tokens that the model reads at once; sys.maxsize where nothing limits them.

    Raises UserError where it has too few token embeddings for its tokenizer.
    """
    config = loaded.model.reader.config
    if len(loaded.tokenizer) > loaded.model.reader.get_input_embeddings().num_embeddings:
        raise UserError(
            f"The tokenizer of {name} has {len(loaded.tokenizer)} tokens, more than the model's "
            "embeddings: use the tokenizer that the model was trained with."
        )
    if getattr(config, "relative_attention", False) and not config.position_biased_input:
        return sys.maxsize
    return trained_length(config)


def trained_length(config) -> int:
    """The tokens of the longest window that a model was made for."""
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        # Their positions start behind the padding's id.
        return config.max_position_embeddings - config.pad_token_id - 1
    return config.max_position_embeddings


def first_line(error: Exception) -> str:
    """The first line of an error's text, for a one-sentence message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
