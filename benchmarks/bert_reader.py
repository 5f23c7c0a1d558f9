"""The BERT readers that are timed, and the operations that they need."""

import numpy as np
import torch
from transformers import BertConfig, BertForQuestionAnswering

FORMULA = (
    "Operations on real tokens only: forward 2 x (layers x (4 w^2 + 2 w f) + 2 w) a token and",
    "4 x layers x w x n^2 a window of n tokens (w: hidden size, f: intermediate size); backward",
    "twice as many.",
)


def bert_reader(
    layers: int,
    hidden_size: int = 384,
    heads: int = 12,
    vocab_size: int = 30522,
    hidden_dropout: float = 0.1,
    attention_dropout: float = 0.1,
) -> BertForQuestionAnswering:
    """A reader with random weights, the same ones each time."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden_size,
        hidden_dropout_prob=hidden_dropout,
        attention_probs_dropout_prob=attention_dropout,
    )
    return BertForQuestionAnswering(config)


def forward_operations(config: BertConfig, lengths: np.ndarray) -> float:
    """Floating-point operations of a forward pass over windows of these lengths; see FORMULA.

    A weight costs a token a multiplication and an addition. In a layer's attention, queries times
    keys and weights times values cost 2 w n^2 each.
    """
    w, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    weights = layers * (4 * w * w + 2 * w * f) + 2 * w
    lengths = lengths.astype(np.float64)
    return float(2 * weights * lengths.sum() + 4 * layers * w * (lengths**2).sum())
