"""Encoders of transformers that read the device in every pass, kept from it: the numbers stay.

A read makes the host wait until the device has done all that it was given.
"""

import sys
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel


def prepare_relative_positions(reader: PreTrainedModel) -> None:
    """Make the relative positions of a DeBERTa-v2 or v3 once, as a buffer of its encoder.

    It makes them in every pass, with a tensor of a Python number that is copied to the device, for
    which the host waits. For windows longer than `max_position_embeddings` it still does.
    """
    if reader.config.model_type != "deberta-v2" or not reader.config.relative_attention:
        return
    encoder: Any = reader.base_model.encoder
    # They depend on the distance alone: those of the longest window begin with a shorter one's.
    longest = torch.empty(1, reader.config.max_position_embeddings, 0)
    positions = encoder.get_rel_pos(longest).to(reader.device)
    encoder.register_buffer("relative_positions", positions, persistent=False)
    encoder.get_rel_pos = MethodType(get_rel_pos, encoder)


def get_rel_pos(
    encoder: Any,
    hidden_states: torch.Tensor,
    query_states: torch.Tensor | None = None,
    relative_pos: torch.Tensor | None = None,
) -> torch.Tensor:
    """In place of the encoder's own, which the kept positions were made by."""
    width, known = hidden_states.shape[1], encoder.relative_positions
    if query_states is None and relative_pos is None and width <= known.shape[1]:
        return known[:, :width, :width]
    return type(encoder).get_rel_pos(encoder, hidden_states, query_states, relative_pos)


def mask_without_sdpa(
    reader: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """The mask for an encoder that has no SDPA attention, such that it does not look for padding.

    Args:
        reader: Whose encoder it is for.
        input_ids: int64 (B, L).
        attention_mask: bool (B, L), True for real tokens, or None where nothing is padding.

    Returns:
        For MPNet what is added to its scores, (B, 1, 1, L) in the type of its weights, or None. For
        DeBERTa int64 (B, L), always: without one it looks for padding, and the convolution of
        DeBERTa-v2-xlarge subtracts it from 1, which bools cannot.
    """
    module = sys.modules[type(reader.base_model).__module__]
    if not hasattr(module, "create_bidirectional_mask"):  # DeBERTa, and any that make it themselves
        return torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    if attention_mask is None:
        return None
    dtype = reader.dtype
    added = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    added.masked_fill_(~attention_mask, torch.finfo(dtype).min)
    return added[:, None, None, :]
