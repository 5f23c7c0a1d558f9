"""The settings of the programs that make data."""

from dataclasses import dataclass
from typing import Literal

from kdfast.common.errors import UserError
from kdfast.common.settings import check_values, flag


@dataclass(frozen=True)
class AugmentConfig:
    """Give --data, --output and at least one of --masked_model, --vectors and --embeddings."""

    data: str = flag("", "File in SQuAD's or another format (docs/data.md), or a hub dataset.")
    output: str = flag("", "JSONL file for the copies.")
    masked_model: str = flag("", "Folder or hub id of a masked language model.")
    vectors: str = flag(
        "", "Text file of word vectors (GloVe, word2vec, fastText); its first 100,000 are read."
    )
    embeddings: str = flag("", "Folder or hub id of a model whose input embeddings are compared.")
    copies: int = flag(20, "Copies of each context.", above=0)
    probability: float = flag(0.4, "Share of the words that are replaced.", least=0, most=1)
    proposals: int = flag(5, "Words that one is drawn from.", above=0, most=1000)
    augment_questions: bool = flag(False, "Replace words of the questions too.")
    answers: Literal["keep", "drop"] = flag(
        "keep",
        "keep: an answer whose words were not replaced stays; a question that loses all of its "
        "answers is unlabelled. drop: all questions are unlabelled.",
    )
    shard: str = flag("", "Make one part of several, such as 0/8; --output is for this part.")
    seed: int = flag(42, "Seed of what is drawn.", least=0, most=2**32 - 1)

    def check(self) -> None:
        """Raise UserError for a flag that is missing or out of range."""
        check_values(self)
        for name in ("data", "output"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing: name a file.")
        if not (self.masked_model or self.vectors or self.embeddings):
            raise UserError(
                "Nothing proposes words: give --masked_model, --vectors or --embeddings, such as "
                "--embeddings with the student."
            )
