"""Checks of a model's config and weights, and of windows that it is to read."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from kdfast.common.errors import UserError
from kdfast.common.files import is_plain_name, listed, read_json_object
from kdfast.data.windows import Windows
from kdfast.models.structure import head_parameters, without_weights

MODEL_FILE = "model.safetensors"
INDEX = f"{MODEL_FILE}.index.json"  # of weights in several files


def check_type(config: PretrainedConfig, name: str, role: str) -> None:
    """Raise UserError unless transformers has a reader of this type, with two logits a token."""
    if type(config) not in MODEL_FOR_QUESTION_ANSWERING_MAPPING:
        raise UserError(
            f"{role} {name} is of type {config.model_type}, for which transformers has no "
            "question-answering model: name a model of another type."
        )
    if config.num_labels != 2:
        raise wrong_labels(config.num_labels, name, role)


def wrong_labels(count: int | None, name: str, role: str) -> UserError:
    """The error for a model with other than two labels."""
    return UserError(
        f"{role} {name} has {count} labels, and a span head has 2: "
        "name a question-answering model, or set num_labels in its config.json."
    )


def check_reads_both_ways(config: PretrainedConfig, name: str, role: str) -> None:
    """Raise UserError for a `config` that transformers does not compute a reader's logits by."""
    switches = ("is_decoder", "add_cross_attention", "is_encoder_decoder")
    switch = next((each for each in switches if getattr(config, each, False)), None)
    if switch:
        raise UserError(
            f"{role} {name} has a decoder ({switch} in its config.json), and a reader looks both "
            "ways: name an encoder."
        )
    is_rotary = getattr(config, "rope_parameters", None) is not None  # which reads no such key
    kind = getattr(config, "position_embedding_type", None)
    if kind not in (None, "absolute") and not is_rotary:
        raise UserError(
            f"{role} {name} has position embeddings of type {kind}, "
            "which transformers 5 leaves out without a word: name a model with absolute ones."
        )
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"{role} {name} is quantized (quantization_config in its config.json): name the model "
            "that it was made from."
        )


def check_files(folder: Path, name: str, role: str) -> None:
    """Raise UserError for a model whose files name others elsewhere, which would be read for it."""
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{role} {name} holds an adapter (adapter_config.json), for another model's weights: "
            "merge the two with peft's merge_and_unload, and name the folder of the result."
        )
    named = read_json_object(folder / INDEX).get("weight_map")
    for each in named.values() if isinstance(named, dict) else ():
        if not is_plain_name(each):
            raise UserError(
                f"{role} {name} does not load ({INDEX} names {each!r}, which is no file's name): "
                "take a whole copy of the model."
            )


def check_sizes(config: PretrainedConfig, folder: Path, name: str, role: str) -> None:
    """Raise UserError where `config` describes more weights than the folder's safetensors hold.

    Only headers are read: memory is taken once it is known for what.
    """
    held, tensors = 0, 0
    for path in listed(folder, "*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118, it is no dict
                held += math.prod(file.get_slice(key).get_shape())
                tensors += 1
    described = math.inf
    repeats = ("num_hidden_layers", "num_hidden_groups", "inner_group_num")  # the last two: ALBERT
    if max(getattr(config, key, 0) for key in repeats) <= tensors:  # every layer has some
        reader = without_weights(config)
        head = sum(each.numel() for _, each in head_parameters(reader))
        described = sum(each.numel() for each in reader.parameters()) - head
    if described > held:
        raise UserError(
            f"{role} {name} lacks weights: it holds {held} of {described} that its config.json "
            "describes: name a complete model."
        )


def check_windows(
    reader: PreTrainedModel, windows: Windows, max_seq_length: int, cache: Path
) -> None:
    """Raise UserError for prepared windows that the model cannot read.

    On a GPU a token without an embedding would end the process during a step.
    """
    known = vocabulary_size(reader)
    blocks = range(0, len(windows.input_ids), 2**22)
    highest = max(int(windows.input_ids[at : at + 2**22].max()) for at in blocks)
    highest = max(highest, windows.pad_token_id)
    fault = None
    if highest >= known:
        fault = f"token {highest}, and the model knows {known}"
    elif windows.lengths.max() > max_seq_length:
        fault = f"a window of {windows.lengths.max()} tokens, more than --max_seq_length"
    if fault:
        raise UserError(
            f"{cache / 'features'} holds {fault}: delete the features there, and they are made "
            "again."
        )


def vocabulary_size(reader: PreTrainedModel) -> int:
    """How many tokens the model has embeddings for."""
    return cast(nn.Embedding, reader.get_input_embeddings()).num_embeddings


def nonfinite_weight(parameters: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of a parameter that is not finite, or None. The host waits for the device once."""
    named = list(parameters)
    sound = torch.stack([torch.isfinite(each).all() for _, each in named]).tolist()
    return next((name for (name, _), good in zip(named, sound, strict=True) if not good), None)
