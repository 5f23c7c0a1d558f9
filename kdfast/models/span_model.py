"""SpanModel: a Hugging Face question-answering model, called the way kdfast needs it."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from kdfast.common.errors import UserError
from kdfast.models.host_reads import mask_without_sdpa, prepare_relative_positions
from kdfast.models.packing import PackedWindows, enable_packing

# Of what a GPU or torch.compile is given every width is a multiple: the tensor cores of a V100 take
# half-precision products whose sizes are multiples of 8, attention reads its mask without a copy,
# and a compiled kernel has its widest loads.
WIDTH = 8


class SpanModel(nn.Module):
    """A Hugging Face question-answering model that returns its logits as one tensor.

    Teachers, students and evaluated models are all of this class. Dropout of `embeds_dropout_prob`
    stands between the encoder and the head, as in Haystack. Under autocast too the head runs in the
    precision of its weights, so that half precision never rounds the logits.
    """

    def __init__(self, reader: PreTrainedModel, embeds_dropout_prob: float = 0.0):
        super().__init__()
        self.reader = reader
        self.dropout = nn.Dropout(embeds_dropout_prob)
        self.takes_4d_mask = reader.config._attn_implementation == "sdpa"
        # RoBERTa has one type only, published DeBERTas and MPNet none, whatever a tokenizer gives.
        types = getattr(reader.base_model.embeddings, "token_type_embeddings", None)
        self.takes_token_types = types is not None and types.num_embeddings > 1
        prepare_relative_positions(reader)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        packed: PackedWindows | None = None,
    ) -> torch.Tensor:
        """Compute the logits.

        Args:
            input_ids: int64 (B, L).
            attention_mask: bool (B, L), True for real tokens, or None where nothing is padding.
            token_type_ids: int64 (B, L), 0 or 1, or None for all 0. A model without embeddings for
                two types never gets them.
            packed: How windows lie in what is then (1, T), after `enable_packing`; None: a row is
                a window.

        Returns:
            (B, L, 2), start and end, in the type of the head's weights. Of packed windows too: a
            row is a window, and its padding is 0.
        """
        hidden = self._encode(input_ids, attention_mask, token_type_ids, packed)[0]
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.head(self.dropout(hidden.to(self.head.weight.dtype)))
        return logits if packed is None else packed.unpack(logits)

    @property
    def head(self) -> nn.Linear:
        """The span head."""
        return cast(nn.Linear, self.reader.qa_outputs)

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The embeddings, then what each layer makes of them: layers + 1 tensors (B, L, width).

        Arguments as forward's.
        """
        encoded = self._encode(input_ids, attention_mask, token_type_ids, output_hidden_states=True)
        return cast(tuple[torch.Tensor, ...], encoded.hidden_states)

    def _encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        packed: PackedWindows | None = None,
        output_hidden_states: bool = False,
    ) -> BaseModelOutput:
        """What transformers' encoder returns."""
        if self.takes_4d_mask and attention_mask is not None:
            # transformers passes a 4-D mask on as it is; a 2-D one makes it read the device.
            attention_mask = attention_mask[:, None, None, :]
            if attention_mask.is_cuda:
                attention_mask = self.additive(attention_mask)
        elif not self.takes_4d_mask:
            attention_mask = mask_without_sdpa(self.reader, input_ids, attention_mask)
        kwargs: dict[str, Any] = {}
        if packed is not None:
            padding_id = getattr(self._positions(), "padding_idx", None)
            kwargs = packed.attention_arguments()
            kwargs["position_ids"] = packed.position_ids(input_ids, padding_id)
        if token_type_ids is not None and self.takes_token_types:
            kwargs["token_type_ids"] = token_type_ids
        return self.reader.base_model(
            input_ids,
            attention_mask=attention_mask,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )

    def additive(self, mask: torch.Tensor) -> torch.Tensor:
        """0 where a bool mask is True, else -inf, in the type that attention has.

        Attention on a GPU adds a mask, and would make it from the bools in every layer.
        """
        device = mask.device.type
        dtype = next(self.reader.parameters()).dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
            ~mask, -torch.inf
        )

    def _positions(self) -> nn.Embedding | None:
        return getattr(self.reader.base_model.embeddings, "position_embeddings", None)

    def width_multiple(self, compiled: bool = False) -> int:
        """The number of which widths of its micro-batches should be multiples; 1 for any.

        compiled: whether torch.compile is given them.
        """
        positions = self._positions()
        # Padding must have a position, too. RoBERTa's has one of its own.
        fits = (
            positions is None
            or positions.padding_idx is not None
            or positions.num_embeddings % WIDTH == 0
        )
        return WIDTH if fits and (compiled or self.head.weight.is_cuda) else 1

    def enable_packing(self) -> None:
        """Let forward() take packed windows; the type must be one of `packing.PACKS`."""
        enable_packing(self.reader)

    def cast_linear_layers(self, dtype: torch.dtype) -> None:
        """Keep the encoder's linear layers in `dtype`, in place, for a model that no longer trains.

        Under autocast to `dtype` the logits stay the same to the bit, and no call casts weights.
        """
        for module in self.reader.base_model.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)

    def enable_gradient_checkpointing(self) -> None:
        """Gradient checkpointing: each layer is computed again in the backward pass."""
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
