"""What a user should hear of the questions of a set: how many, and which of them first."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Why a record is no question that anything can use.
UNREAD = {
    "no_context": "have no context",
    "no_question": "have no question",
    "unreadable": "cannot be read",
}
# Why a question is left out of training; an evaluation asks it all the same.
UNTRAINED = {
    "absent": "have an answer that is not in their context",
    "ambiguous": "have an answer that is several times in their context, and not where it is said",
    "no_token": "have an answer of characters that the tokenizer drops",
    "longer_than_window": "have an answer that no window holds whole, as --max_seq_length is "
    "{max_seq_length} and --doc_stride {doc_stride}",
}
# What is so of questions that are read; of a label in training alone.
READ = {
    "same_id": "have an id that an earlier one has: it gets #2, #3 and so on",
    "impossible_with_answers": "are marked is_impossible and have answers: they count as "
    "answerable, as in the official script",
    "empty_answer": "have only answers without a text: they count as unanswerable",
    "truncated_questions": "are longer than --max_query_length {max_query_length}, and are cut",
}
LABELS = {
    "moved": "have their answer elsewhere than stated, or no place stated: it is found in the "
    "context",
    "later_answer": "have a first answer without a place in the context: a later one is taught",
    "unlabelled": "have no answers: no gold label, soft term only",
}
COUNTED = {**UNREAD, **UNTRAINED, **READ, **LABELS}


@dataclass
class Tally:
    """Of how many questions something is true, by the keys above, and the first three ids."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, name: str | None = None) -> None:
        """Counts one more question. name: its id, where messages are to show it."""
        self.counts[what] = self.counts.get(what, 0) + 1
        if name is None:
            return
        names = self.first.setdefault(what, [])
        if len(names) < 3:
            names.append(name)

    def merge(self, later: Tally) -> None:
        """Adds what another one counted, of questions that come after those of this one."""
        for what, count in later.counts.items():
            self.counts[what] = self.counts.get(what, 0) + count
        for what, names in later.first.items():
            known = self.first.setdefault(what, [])
            known += names[: 3 - len(known)]

    def read(self) -> int:
        """The questions of the source, those that cannot be used included."""
        return self.counts.get("read", self.counts.get("questions", 0))

    def notes(self, settings: Mapping[str, Any], training: bool = True) -> list[str]:
        """A sentence for each thing that is true. training: also what concerns labels alone."""
        sentences = {key: f"{text}: left out" for key, text in UNREAD.items()} | READ
        if training:
            sentences |= {key: f"{text}: left out of training" for key, text in UNTRAINED.items()}
            sentences |= LABELS
        found = []
        for what, sentence in sentences.items():
            if count := self.counts.get(what):
                names = self.first.get(what, [])
                which = (
                    f" ({', '.join(names)}{', …' if count > len(names) else ''})" if names else ""
                )
                sentence = sentence.format_map(defaultdict(lambda: "?", settings))
                found.append(f"{count} of {self.read()} questions {sentence}{which}.")
        return found
