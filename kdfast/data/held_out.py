"""Articles of the training data that are held out for evaluation."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from kdfast.common.errors import UserError
from kdfast.data.examples import Example


def article_of(example: Example) -> str:
    """What a question is held out with: the title of its article, or a hash of its context."""
    return example.title or hashlib.sha256(example.context.encode()).hexdigest()


def choose_articles(
    files: Sequence[tuple[str, Sequence[Example]]], share: float, seed: int
) -> set[str]:
    """The articles that are held out: of each file as many as hold `share` of its questions.

    An order of all articles, drawn from the seed, says which come first: what is held out of one
    file tends to be held out of another that has the same articles.

    Args:
        files: Names and questions.
        share: From 0 to 1.
        seed: Of the order.

    Raises:
        UserError: For a file of which no article would be left.
    """
    chosen: set[str] = set()
    for name, examples in files:
        counts = Counter(map(article_of, examples))
        held, held_questions = set(), 0
        for article in sorted(counts, key=lambda text: _place(text, seed)):
            if held_questions >= share * len(examples):
                break
            held.add(article)
            held_questions += counts[article]
        if len(held) == len(counts):
            raise UserError(
                f"--validation_split {share} holds out whole articles, and would leave none of the "
                f"{len(counts)} of {name}: give a smaller one, or --validation_file."
            )
        chosen |= held
    return chosen


def _place(article: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {article}".encode()).digest()
