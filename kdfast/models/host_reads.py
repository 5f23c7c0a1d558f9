"""Encoders of transformers that read the device in every pass, kept from it: the numbers stay.

A read makes the host wait until the device has done all that it was given.
"""

import sys

import torch
from transformers import PreTrainedModel


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
