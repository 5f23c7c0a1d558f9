"""Readers: loaded, checked, cut down to some layers."""

import copy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from kdfast.common.errors import UserError, first_line
from kdfast.common.files import listed, read_json_object
from kdfast.models import deberta
from kdfast.models.checks import (
    check_files,
    check_reads_both_ways,
    check_sizes,
    check_type,
    vocabulary_size,
    wrong_labels,
)
from kdfast.models.comparison import check_reads_alike
from kdfast.models.hub import local_folder, without_safetensors
from kdfast.models.span_model import SpanModel
from kdfast.models.structure import encoder_prefix, layer_stack, span_head_name, trained_length
from kdfast.tokenizers.load import load_tokenizer

MOST = 10_000  # labels or layers that transformers may make a list of, which takes memory


@dataclass
class Loaded:
    """A model with its tokenizer; a program prints the sentences in `notes`."""

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
    """Load a model in fp32, whatever the checkpoint's type.

    Args:
        name: A folder or a hub id.
        role: The flag that names it, such as "--teacher", for error messages.
        new_head_seed: Seed of a new span head for a model that has none; None refuses it.
        embeds_dropout_prob: Of the dropout before the head.
        tokenizer: Used instead of the folder's.

    Raises:
        UserError: There is no usable model, or one that SpanModel would read otherwise.
    """
    folder = local_folder(name, role)
    config = load_config(folder, name, role)
    if not listed(folder, "*.safetensors"):
        raise without_safetensors(folder, name, role)
    check_files(folder, name, role)
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
    except UserError:
        raise
    except Exception as error:  # safetensors and transformers share no base class for these
        raise _does_not_load(name, role, error) from error
    notes = []
    missing = sorted(info["missing_keys"])
    encoder_missing = [key for key in missing if key.startswith(encoder_prefix(reader))]
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
        reset_head(reader, missing, new_head_seed)
        notes.append(f"{name} has no question-answering head: a new one is drawn from the seed.")
    if reader.config._attn_implementation != "sdpa" and config.model_type not in deberta.TYPES:
        notes.append(f"{config.model_type} has no SDPA attention here: eager attention is used.")
    model = span_model_of(reader, name, role, embeds_dropout_prob)
    if tokenizer is None:
        tokenizer = load_tokenizer(folder, role)
    return Loaded(model, tokenizer, notes)


def load_config(folder: Path, name: str, role: str) -> PretrainedConfig:
    """The configuration in `folder`. Raises UserError unless it is of a supported reader."""
    said = read_json_object(folder / "config.json")
    labels, layers = said.get("num_labels"), said.get("num_hidden_layers")
    if isinstance(labels, int) and labels > MOST:
        raise wrong_labels(labels, name, role)
    if isinstance(layers, int) and layers > MOST:
        raise UserError(
            f"{role} {name} lacks weights: no model holds the {layers} layers that its config.json "
            "describes: name a complete model."
        )
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
    state_layer_types(config, list(range(len(getattr(config, "layer_types", None) or ()))))
    return config


def _does_not_load(name: str, role: str, error: Exception) -> UserError:
    return UserError(
        f"{role} {name} does not load ({first_line(error)}): name a folder with a "
        "config.json and the weights in safetensors."
    )


def span_model_of(
    reader: PreTrainedModel, name: str, role: str, embeds_dropout_prob: float = 0.0
) -> SpanModel:
    """The SpanModel of a model of transformers. Raises UserError for one that it cannot read.

    It is compared in fp32 on the CPU: by a copy, where it is elsewhere. Layers of a quantized one,
    which cannot be copied so, are not.
    """
    if span_head_name(reader) is None:
        raise UserError(
            f"{role} {name} is of type {reader.config.model_type}, whose span head is not one "
            "linear layer on its hidden states: name a model of another type."
        )
    if not getattr(reader.config, "quantization_config", None):
        parameter = next(reader.parameters())
        tried = reader
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu" or reader.training:
            tried = copy.deepcopy(reader).eval()
            nn.Module.to(tried, "cpu", torch.float32)
        check_reads_alike(tried, name, role)
    return SpanModel(reader, embeds_dropout_prob)


def reset_head(reader: PreTrainedModel, missing: list[str], seed: int) -> None:
    """Draw the `missing` weights of the head, from `seed` alone: normal as in BERT, biases zero.

    Norms are 1. Of ModernBERT, what its masked language model has of the head stays.
    """
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key in missing:
            weight = reader.get_parameter(key)
            if weight.dim() > 1:
                weight.normal_(0.0, reader.config.initializer_range, generator=draw)
            else:
                weight.fill_(0.0 if key.endswith("bias") else 1.0)


def keep_layers(loaded: Loaded, layers: list[int], name: str) -> None:
    """Keep only `layers` (rising, counted from 0) of the encoder, in place.

    Embeddings and head stay. Raises UserError where the model has no such layers.
    """
    reader = loaded.model.reader
    found = layer_stack(reader)
    if found is None:
        raise UserError(
            f"--student_layers: {name} ({reader.config.model_type}) shares one layer throughout, "
            "or has them in parts: name a --student of its own."
        )
    stack = cast(nn.ModuleList, getattr(*found))
    if layers[-1] >= len(stack):
        raise UserError(
            f"--student_layers names layer {layers[-1]}, and {name} has layers "
            f"0 to {len(stack) - 1}."
        )
    kept = [stack[index] for index in layers]
    # In a new place a layer must have the weights that transformers looks for there. The first
    # of ModernBERT has a norm less than the others.
    if kept[0].state_dict().keys() != stack[0].state_dict().keys():
        raise UserError(
            f"--student_layers: the first layer of {name} ({reader.config.model_type}) is unlike "
            "the others: let the list begin with 0."
        )
    setattr(*found, nn.ModuleList(kept))
    reader.config.num_hidden_layers = len(layers)  # every module's: they share it
    state_layer_types(reader.config, layers)
    loaded.notes.append(f"The student keeps layers {layers} of {name}.")


def state_layer_types(config: PretrainedConfig, layers: list[int]) -> None:
    """State the kinds of `layers` in a config where they differ (ModernBERT: near and far), and
    their rotary bases, by the names that transformers 4 reads, too.

    It knows the kinds by `global_attn_every_n_layers` only, and takes 3 where that is absent. Where
    no number says it, 0 makes that version fail and not compute something else.
    """
    types = getattr(config, "layer_types", None)
    if not types:
        return
    config.layer_types = kinds = [types[index] for index in layers]
    far = [kind == "full_attention" for kind in kinds]
    steps = range(1, len(kinds) + 1)
    fits = (n for n in steps if far == [index % n == 0 for index in range(len(kinds))])
    config.global_attn_every_n_layers = next(fits, 0)
    bases = getattr(config, "rope_parameters", None) or {}
    names = {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"}
    for kind in names.keys() & bases.keys():
        setattr(config, names[kind], bases[kind]["rope_theta"])


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
    highest = max(loaded.tokenizer.get_vocab().values(), default=0)
    if highest >= vocabulary_size(loaded.model.reader):
        raise UserError(
            f"The tokenizer of {name} has ids up to {highest}, and the model has embeddings up to "
            f"{vocabulary_size(loaded.model.reader) - 1}: use the tokenizer that the model was "
            "trained with."
        )
    if getattr(config, "relative_attention", False) and not config.position_biased_input:
        return sys.maxsize
    return trained_length(loaded.model.reader)
