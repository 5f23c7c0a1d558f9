"""The attention of the DeBERTas: what it adds to the scores, in products, and then torch's own.

He et al. 2020 (arxiv.org/abs/2006.03654) add to the score of query i and key j, at the distance
i - j, the products of the query and of the key with embeddings of that distance. transformers
multiplies with the embeddings of all distances and gathers from the products, each layer for each
window and head, and backward scatters. Here the embeddings are put in the order of the distances
first, once for a layer: then what belongs to a query lies in the products next to each other, and
the scores are a view of them. Weights, and the probabilities of real tokens, are those of
transformers; padding looks at real tokens as others do, where transformers has it look at all.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.deberta import modeling_deberta as v1
from transformers.models.deberta_v2 import modeling_deberta_v2 as v2

TYPES = ("deberta", "deberta-v2")


def prepare_deberta(reader: PreTrainedModel) -> None:
    """Give a DeBERTa, of any version, the attention of this module, in place; no other type."""
    if reader.config.model_type not in TYPES or getattr(reader.config, "talking_head", False):
        return
    encoder: Any = reader.base_model.encoder
    encoder.__class__ = EncoderV1 if reader.config.model_type == "deberta" else EncoderV2
    for module in encoder.modules():
        if isinstance(module, v1.DisentangledSelfAttention):
            module.__class__ = AttentionV1
        elif isinstance(module, v2.DisentangledSelfAttention):
            module.__class__ = AttentionV2
        if isinstance(module, Attention):
            module.prepare()
    if encoder.relative_attention:
        rows = encoder.rows_by_distance(reader.config.max_position_embeddings)
        encoder.register_buffer("distance_rows", rows.to(reader.device), persistent=False)


class Attend(nn.Module):
    """softmax(scaling * query @ key^T + bias) @ value, with dropout of probability p between.

    query, key, value: (H, B, L, D). bias: (H, B, L, L), or what broadcasts to it, finite.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        scaling: float,
        p: float,
    ) -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=p, scale=scaling
        )


class Encoder:
    """What the encoders of both versions make once for all layers."""

    distance_rows: torch.Tensor
    rel_embeddings: nn.Embedding
    relative_attention: bool

    def rows_by_distance(self, longest: int) -> torch.Tensor:
        """int64 (2 * longest + 1,): the row of `rel_embeddings` for distances from -longest."""
        device = self.rel_embeddings.weight.device
        found = super().get_rel_pos(torch.empty(1, longest + 1, 0, device=device))[0]  # type: ignore[misc]
        span = self.rel_embeddings.num_embeddings // 2
        ordered = torch.cat([found[0].flip(0), found[1:, 0]])
        return (ordered + span).clamp(0, 2 * span - 1)

    def get_rel_pos(
        self, hidden_states: torch.Tensor, query_states: Any = None, relative_pos: Any = None
    ) -> torch.Tensor | None:
        """int64 (2, 2 L): the rows for the distances L, L - 1, ... and for -L, -L + 1, ...

        Windows longer than `max_position_embeddings` make the host wait for the device.
        """
        if not self.relative_attention:
            return None
        length, rows = hidden_states.shape[1], self.distance_rows
        longest = len(rows) // 2
        if length > longest:
            rows, longest = self.rows_by_distance(length), length
        near = rows[longest - length : longest + length + 1]
        return torch.stack([near[1:].flip(0), near[:-1]])

    def get_attention_mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """What is added to the scores (H, B, L, L): the least number for padding, else 0."""
        if attention_mask.dim() == 2:
            attention_mask = attention_mask[:, None]
        if attention_mask.dim() == 3:
            attention_mask = attention_mask[:, None]
        mask = attention_mask.transpose(0, 1).bool()
        dtype = next(self.parameters()).dtype  # type: ignore[attr-defined]
        if torch.is_autocast_enabled(mask.device.type):
            dtype = torch.get_autocast_dtype(mask.device.type)
        added = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return added.masked_fill_(~mask, torch.finfo(dtype).min)


class Attention:
    """What the attention of both versions has in common."""

    num_attention_heads: int
    attention_head_size: int
    dropout: nn.Dropout
    pos_att_type: Any
    training: bool

    def heads_of(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value, (H, B, L, D), of hidden states (B, L, width)."""
        raise NotImplementedError

    def positions(
        self, rel_embeddings: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Keys and queries of the distances, (2 L, H * D); None: without one."""
        raise NotImplementedError

    def prepare(self) -> None:
        """What transformers' own has not."""
        terms = 1 + sum(each in self.pos_att_type for each in ("c2p", "p2c"))
        # transformers' root is of fp32.
        root = torch.tensor(self.attention_head_size * terms, dtype=torch.float32).sqrt()
        self.scaling = 1 / float(root)
        self.attend = Attend()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        output_attentions: bool = False,
        query_states: None = None,
        relative_pos: torch.Tensor | None = None,
        rel_embeddings: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, L, width), and None or the probabilities (B, H, L, L); as transformers calls it.

        attention_mask and relative_pos: as Encoder makes them.
        """
        query, key, value = self.heads_of(hidden_states)
        bias = attention_mask
        if relative_pos is not None and rel_embeddings is not None:
            keys, queries = self.positions(rel_embeddings, relative_pos)
            bias = position_scores(query, key, keys, queries, self.scaling, attention_mask)
        p = self.dropout.p if self.training else 0.0
        mixed = self.attend(query, key, value, bias, self.scaling, p)
        mixed = mixed.permute(1, 2, 0, 3).flatten(2)
        if not output_attentions:
            return mixed, None
        scores = self.scaling * query @ key.mT + bias
        return mixed, scores.softmax(-1).transpose(0, 1)

    def split(self, projected: torch.Tensor) -> torch.Tensor:
        """(B, L, H * D) to (H, B, L, D)."""
        return projected.unflatten(-1, (self.num_attention_heads, -1)).permute(2, 0, 1, 3)


def position_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    keys: torch.Tensor | None,
    queries: torch.Tensor | None,
    scaling: float,
    mask: torch.Tensor,
) -> torch.Tensor:
    """(H, B, L, L): what is added to scaling * query @ key^T.

    query, key: (H, B, L, D). keys, queries: (2 L, H * D), of the distances in the order that
    `get_rel_pos` gives; None: without this term. mask: what is added to all.
    """
    found = mask
    if queries is not None:
        found = by_distance(key, queries * scaling).mT + found
    if keys is not None:
        found = by_distance(query, keys * scaling) + found
    return found


def by_distance(content: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(H, B, L, L): at [.., i, j] the product of content[.., i] and position j - i + L.

    content: (H, B, L, D). positions: (2 L, H * D).
    """
    heads, rows, length, _ = content.shape
    positions = positions.unflatten(1, (heads, -1)).permute(1, 2, 0)
    products = torch.bmm(content.flatten(1, 2), positions)  # (H, B * L, 2 L)
    wide = 2 * length
    shape = (heads, rows, length, length)
    strides = (rows * length * wide, length * wide, wide - 1, 1)
    return products.as_strided(shape, strides, length)


class AttentionV1(Attention, v1.DisentangledSelfAttention):  # type: ignore[misc]
    """DeBERTa's."""

    def heads_of(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = self.split(self.in_proj(hidden)).chunk(3, dim=-1)
        biases = (
            each.view(self.num_attention_heads, 1, 1, -1).to(query.dtype)
            for each in (self.q_bias, self.v_bias)
        )
        return query + next(biases), key, value + next(biases)

    def positions(
        self, rel_embeddings: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        dropped = self.pos_dropout(rel_embeddings)
        keys = queries = None
        # Each distance has a row of its own: the rows are fewer here than in the table.
        if "c2p" in self.pos_att_type:
            keys = self.pos_proj(functional.embedding(rows[0], dropped))
        if "p2c" in self.pos_att_type:
            queries = self.pos_q_proj(functional.embedding(rows[1], dropped))
        return keys, queries


class AttentionV2(Attention, v2.DisentangledSelfAttention):
    """DeBERTa-v2's and v3's."""

    def heads_of(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            self.split(self.query_proj(hidden)),
            self.split(self.key_proj(hidden)),
            self.split(self.value_proj(hidden)),
        )

    def positions(
        self, rel_embeddings: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        dropped = self.pos_dropout(rel_embeddings)
        keys = queries = None
        if "c2p" in self.pos_att_type:
            project = self.key_proj if self.share_att_key else self.pos_key_proj
            keys = functional.embedding(rows[0], project(dropped))
        if "p2c" in self.pos_att_type:
            project = self.query_proj if self.share_att_key else self.pos_query_proj
            queries = functional.embedding(rows[1], project(dropped))
        return keys, queries


class EncoderV1(Encoder, v1.DebertaEncoder):
    """DeBERTa's."""


class EncoderV2(Encoder, v2.DebertaV2Encoder):
    """DeBERTa-v2's and v3's."""
