"""SpanModel: a Hugging Face question-answering model, called the way kdfast needs it."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from kdfast.common.errors import UserError
from kdfast.models.deberta import prepare_deberta
from kdfast.models.host_reads import mask_without_sdpa
from kdfast.models.packing import PackedWindows, enable_packing
from kdfast.models.structure import BEFORE_HEAD, position_table, span_head_name

# Of what a GPU or torch.compile is given every width is a multiple: the tensor cores of a V100 take
# half-precision products whose sizes are multiples of 8, attention reads its mask without a copy,
# and a compiled kernel has its widest loads.
WIDTH = 8


def reach_of(reader: PreTrainedModel) -> int | None:
    """How far ModernBERT's local layers look to each side; None: there are none."""
    if "sliding_attention" in (getattr(reader.config, "layer_types", None) or ()):
        return cast(int, reader.config.sliding_window)
    return None


def takes_token_types(reader: PreTrainedModel) -> bool:
    """Whether a model tells two types of tokens apart.

    RoBERTa has one type only, published DeBERTas and MPNet none, whatever a tokenizer gives.
    """
    embeddings = getattr(reader.base_model, "embeddings", None)
    types = getattr(embeddings, "token_type_embeddings", None)
    return isinstance(types, nn.Embedding) and types.num_embeddings > 1


class SpanModel(nn.Module):
    """A Hugging Face question-answering model that returns its logits as one tensor.

    Teachers, students and evaluated models are all of this class. Dropout of `embeds_dropout_prob`
    stands before the head, as in Haystack, in place of the one that a type may have there
    (`qa_dropout` of DistilBERT, `classifier_dropout` of ModernBERT). Under autocast too the head
    runs in the precision of its weights, so that half precision never rounds the logits.
    """

    def __init__(self, reader: PreTrainedModel, embeds_dropout_prob: float = 0.0):
        super().__init__()
        self.reader = reader
        self.dropout = nn.Dropout(embeds_dropout_prob)
        self._head = cast(str, span_head_name(reader))
        self.takes_4d_mask = reader.config._attn_implementation == "sdpa"
        self.reach = reach_of(reader)
        self.takes_token_types = takes_token_types(reader)
        prepare_deberta(reader)

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
            hidden = hidden.to(self.head.weight.dtype)
            for name in BEFORE_HEAD.get(self.reader.config.model_type, ()):
                hidden = getattr(self.reader, name)(hidden)
            logits = self.head(self.dropout(hidden))
        return logits if packed is None else packed.unpack(logits)

    @property
    def head(self) -> nn.Linear:
        """The span head."""
        return cast(nn.Linear, getattr(self.reader, self._head))

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
        # transformers passes a 4-D mask on as it is; a 2-D one makes it read the device.
        masks: Any = self._mask_4d(attention_mask)
        if not self.takes_4d_mask:
            masks = mask_without_sdpa(self.reader, input_ids, attention_mask)
        elif self.reach is not None:
            near = self._near_mask(attention_mask, input_ids, self.reach)
            masks = {"full_attention": masks, "sliding_attention": self._mask_4d(near)}
        kwargs: dict[str, Any] = {}
        if packed is not None:
            padding_id = getattr(position_table(self.reader), "padding_idx", None)
            kwargs = packed.attention_arguments()
            kwargs["position_ids"] = packed.position_ids(input_ids, padding_id)
        if token_type_ids is not None and self.takes_token_types:
            kwargs["token_type_ids"] = token_type_ids
        return self.reader.base_model(
            input_ids,
            attention_mask=masks,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )

    def _mask_4d(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """(B, L) keys, or (B, L, L) queries and keys, to what attention takes."""
        if mask is None:
            return None
        mask = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]
        return self.additive(mask) if mask.is_cuda else mask

    def _near_mask(
        self, mask: torch.Tensor | None, input_ids: torch.Tensor, reach: int
    ) -> torch.Tensor | None:
        """Bool (B, L, L), or (1, L, L) without a mask: where a key is real and within reach."""
        width = input_ids.shape[1]
        if width <= reach + 1:
            return mask
        place = torch.arange(width, device=input_ids.device)
        near = ((place[:, None] - place).abs() <= reach)[None]
        # Padding looks at every real token: of no key at all, softmax would be NaN.
        return near if mask is None else mask[:, None, :] & (near | ~mask[:, :, None])

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

    def width_multiple(self, compiled: bool = False) -> int:
        """The number of which widths of its micro-batches should be multiples; 1 for any.

        compiled: whether torch.compile is given them.
        """
        positions = position_table(self.reader)
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
