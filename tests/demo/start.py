"""The teacher before its first lesson: random weights, and a few attention heads set by hand.

A small encoder without pretraining takes long to find out that a name in the question and the same
name in the passage belong together, and that neighbours do. Some heads of the first two layers
start with just that: one looks for the same word in the other segment, two look a step (in the
second layer some steps) backward and forward. Training is free to change all of it.
"""

from __future__ import annotations

import math

import torch
from transformers import BertConfig, BertForQuestionAnswering
from transformers.models.bert.modeling_bert import BertEmbeddings, BertSelfAttention

WIDTH, LAYERS, HEADS = 128, 4, 4
FREQUENCIES = 16  # of the positions' sine waves, which fill the first 32 dimensions
SEGMENT = 2 * FREQUENCIES  # the dimension that tells question from passage; words have the rest
DEVIATION = 0.06


def start_model(vocabulary_size: int, positions: int, seed: int) -> BertForQuestionAnswering:
    """A BERT span reader, fp32, that `seed` decides."""
    draw = torch.Generator().manual_seed(seed)
    model = BertForQuestionAnswering(
        BertConfig(
            vocab_size=vocabulary_size,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=2 * WIDTH,
            max_position_embeddings=positions,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0.0, DEVIATION, generator=draw)
        model.qa_outputs.weight.mul_(0.3)
        _set_embeddings(model.bert.embeddings)
        for layer in model.bert.encoder.layer:
            attention = layer.attention.self
            attention.key.weight.copy_(attention.query.weight)  # like looks for like
        for index, steps, sharpness, used in ((0, 1, 1.24, FREQUENCIES), (1, 4, 1.6, 8)):
            attention = model.bert.encoder.layer[index].attention.self
            _match_words(attention, draw)
            _look_aside(attention, 1, -steps, sharpness, used)
            _look_aside(attention, 2, steps, sharpness, used)
    return model


def _frequencies() -> torch.Tensor:
    """Radians a token, unevenly spaced so that no two distances look alike."""
    return 2.5 * ((torch.arange(FREQUENCIES) + 0.5) / FREQUENCIES) ** 1.5


def _set_embeddings(embeddings: BertEmbeddings) -> None:
    """Positions, segments and words in dimensions of their own, of like size."""
    position = embeddings.position_embeddings.weight
    angle = torch.arange(len(position))[:, None] * _frequencies()
    position.zero_()
    position[:, 0:SEGMENT:2] = angle.sin() * DEVIATION * math.sqrt(2)
    position[:, 1:SEGMENT:2] = angle.cos() * DEVIATION * math.sqrt(2)
    segment = embeddings.token_type_embeddings.weight
    segment.zero_()
    segment[0, SEGMENT], segment[1, SEGMENT] = 2 * DEVIATION, -2 * DEVIATION
    embeddings.word_embeddings.weight[:, : SEGMENT + 1] = 0


def _match_words(attention: BertSelfAttention, draw: torch.Generator) -> None:
    """Head 0 looks for its own word: a score of about 8, and 3 more in the other segment."""
    size = attention.attention_head_size
    words = WIDTH - SEGMENT - 1
    deviation = math.sqrt(8 * math.sqrt(size) / ((size - 1) * words))
    project = torch.zeros(size, WIDTH)
    project[:-1, SEGMENT + 1 :] = deviation * torch.randn(size - 1, words, generator=draw)
    attention.query.weight[:size] = project
    attention.key.weight[:size] = project
    attention.query.weight[size - 1, SEGMENT] = 2.06
    attention.key.weight[size - 1, SEGMENT] = -2.06


def _look_aside(
    attention: BertSelfAttention, head: int, steps: int, sharpness: float, used: int
) -> None:
    """Head `head` looks `steps` tokens aside: its query is its own position, turned by as much."""
    size = attention.attention_head_size
    rows = slice(head * size, (head + 1) * size)
    query, key = torch.zeros(size, WIDTH), torch.zeros(size, WIDTH)
    for i, frequency in enumerate(_frequencies()[:used].tolist()):
        cos, sin = math.cos(frequency * steps), math.sin(frequency * steps)
        pair = slice(2 * i, 2 * i + 2)
        query[pair, pair] = torch.tensor([[cos, sin], [-sin, cos]])
        key[pair, pair] = torch.eye(2)
    attention.query.weight[rows] = query * math.sqrt(sharpness)
    attention.key.weight[rows] = key * math.sqrt(sharpness)
