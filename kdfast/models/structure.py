"""Where a model of transformers has its span head, its layers and its positions.

Found by looking at the model. What cannot be seen is in BEFORE_HEAD; `comparison` proves both.
"""

import sys
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForQuestionAnswering, PretrainedConfig, PreTrainedModel

# Model type -> what its forward() puts between encoder and span head, dropout left out.
BEFORE_HEAD = {"modernbert": ("head",)}
POSITIONS = ("position_embeddings", "embed_positions")  # transformers' names for their table


def span_head_name(reader: PreTrainedModel) -> str | None:
    """The name of the linear layer of two outputs that stands on the encoder; None: there is none.

    Some have a head of their own make instead (Splinter, BigBird), or none (an encoder).
    """
    found = [
        name
        for name, each in reader.named_children()
        if isinstance(each, nn.Linear) and each.out_features == 2
    ]
    return found[0] if len(found) == 1 and reader.base_model is not reader else None


def head_parameters(reader: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    """The parameters outside of the encoder, with their names."""
    encoder = encoder_prefix(reader)
    return [
        (name, each) for name, each in reader.named_parameters() if not name.startswith(encoder)
    ]


def encoder_prefix(reader: PreTrainedModel) -> str:
    """What the names of the encoder's weights begin with."""
    return f"{reader.base_model_prefix}."


def layer_stack(reader: PreTrainedModel) -> tuple[nn.Module, str] | None:
    """The module that holds the encoder's layers, and their name in it.

    None: the layers are one that is shared (ALBERT), or lie in several lists of parts (XLM).
    """
    for module in reader.base_model.modules():  # what is outside comes first
        found = [
            name
            for name, each in module.named_children()
            if isinstance(each, nn.ModuleList) and len(each) == reader.config.num_hidden_layers
        ]
        if found:
            return (module, found[0]) if len(found) == 1 else None
    return None


def position_table(reader: PreTrainedModel) -> nn.Embedding | None:
    """The embeddings of absolute positions; None where there are none, as with rotary ones."""
    named = reader.base_model.named_modules()
    tables = (each for name, each in named if name.rpartition(".")[2] in POSITIONS)
    return next((each for each in tables if isinstance(each, nn.Embedding)), None)


def without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a config, without memory for weights."""
    with torch.device("meta"):
        return cast(PreTrainedModel, AutoModelForQuestionAnswering.from_config(config))


def trained_length(reader: PreTrainedModel) -> int:
    """The tokens of the longest window that a model was made for; sys.maxsize where it has none."""
    longest = getattr(reader.config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        return sys.maxsize
    table = position_table(reader)
    # RoBERTa's positions start behind the padding's id.
    return (
        longest if table is None or table.padding_idx is None else longest - table.padding_idx - 1
    )


def attention_dropout(config: PretrainedConfig) -> tuple[str, float]:
    """The name that a config has for the dropout inside attention, and its value."""
    for name in ("attention_probs_dropout_prob", "attention_dropout"):
        if hasattr(config, name):
            return name, getattr(config, name)
    return "attention_dropout", 0.0
