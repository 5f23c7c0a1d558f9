"""A student's windows, read again in a teacher's tokenizer: same question, same characters.

A teacher with another tokenizer cannot read the student's tokens. Each window of the student is
rewindowed: the tokens of the teacher's tokenizer that stand for any of its characters are one
window of the teacher, or several where they are longer than the teacher reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from kdfast.common.ranks import Ranks
from kdfast.config import WindowSettings
from kdfast.data.cache import ARRAYS, UNLABELLED, Kinds, cache_folder, damaged, open_array
from kdfast.data.prepare import cached_windows, prepare_windows
from kdfast.data.validate import rises
from kdfast.data.windows import Parts, Windows
from kdfast.teachers.char_spans import spans_of
from kdfast.tokenizers.encode import ragged, starts_of
from kdfast.tokenizers.template import Template, tokenizer_key

FORMAT = 1  # part of every key: raise it when files or meaning change
# Settings under which every question is one window, with the whole of its context.
WHOLE = WindowSettings(max_seq_length=1 << 30, max_query_length=1 << 29, doc_stride=1)
FIRST: dict[str, Kinds] = {"first_piece": (np.int64,)}
_VALUES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Rewindowed:
    """The teacher's windows, in the order of the student's.

    windows: unlabelled. first: int64 (W + 1,); the student's window w is read in windows first[w]
    to first[w + 1] - 1.
    """

    windows: Windows
    first: np.ndarray


def rewindow(
    student: Windows,
    source: str,
    tokenizer: Any,
    settings: WindowSettings,
    *,
    cache_dir: Path | str,
    ranks: Ranks | None = None,
) -> Rewindowed:
    """Read the student's windows again in another tokenizer; from the cache if they are there.

    What is longer than max_seq_length is read in several windows of full length, evenly spread. A
    question takes half of a window at most and loses the rest; windows.counts holds under
    "truncated_questions" how many do.

    Args:
        student: Windows that were prepared from `source`, as training data.
        source: The file, folder or hub's data set.
        tokenizer: The teacher's.
        settings: max_seq_length, the most tokens that the teacher reads at once, and doc_stride:
            windows on one window of the student begin at most so many tokens, or half of their
            context, apart.
        cache_dir: Its folder `features` holds the result, under a key of the student's windows,
            the tokenizer and the settings.
        ranks: All of them must call this.

    Raises:
        UserError: As prepare_windows.
    """
    length, stride = settings.max_seq_length, settings.doc_stride
    used = {"max_seq_length": length, "doc_stride": stride}
    parts = [FORMAT, "pieces", student.key, tokenizer_key(tokenizer), used]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def whole(ranks: Ranks | None = None) -> Windows:
        return prepare_windows(
            source, tokenizer, WHOLE, cache_dir=cache_dir, split="train", ranks=ranks
        )

    made = Rewindower(student, Template.learn(tokenizer), length, stride)
    windows = cached_windows(cache_dir, _Cache(key, made, used, whole), ranks)
    folder = cache_folder(cache_dir, key)
    first = open_array(folder, "first_piece", FIRST["first_piece"])
    if len(first) != len(student) + 1 or not rises(first, len(windows)):
        raise damaged(folder, f"first_piece is not of {len(student)} windows in {len(windows)}")
    return Rewindowed(windows, first)


@dataclass
class _Cache:
    """What the cache of the teacher's windows is made of; `whole` gives those of whole contexts."""

    key: str
    made: Rewindower
    settings: dict[str, int]
    whole: Callable[..., Windows]
    kinds: ClassVar[dict[str, Kinds]] = {**ARRAYS, **FIRST}

    def share(self, folder: Path, ranks: Ranks) -> None:
        self.whole(ranks)  # nearly all of the work

    def arrays(self, folder: Path, partial: Path) -> Parts:
        yield from self.made.arrays(self.whole())

    def header(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "format": FORMAT,
            "settings": self.settings,
            "pad_token_id": self.made.template.pad_token_id,
            "uses_token_types": self.made.template.uses_token_types,
            "counts": self.made.counts,
            "first": {},
        }


@dataclass
class Rewindower:
    """Makes the teacher's windows, block by block, out of its windows of whole contexts.

    max_seq_length, doc_stride: the settings of `rewindow`. counts: how many questions, windows and
    tokens there are.
    """

    student: Windows
    template: Template
    max_seq_length: int
    doc_stride: int
    counts: dict[str, int] = field(default_factory=dict)

    def arrays(self, whole: Windows) -> Iterator[dict[str, np.ndarray]]:
        """Yields the arrays of Windows in parts, and those of FIRST.

        whole: the teacher's, one window for each question of the student's windows.
        """
        self.counts = dict.fromkeys(whole.counts, 0)
        self._id_bytes = 0
        heads = ("window_start", "question_token_start", "question_id_start", "first_piece")
        yield dict.fromkeys(heads, np.zeros(1, dtype=np.int64))
        for name in ("context_token_start", "context_char_start", "context_char_count"):
            array = getattr(whole, name)
            for begin in range(0, len(array), _VALUES_AT_ONCE):
                yield {name: array[begin : begin + _VALUES_AT_ONCE]}
        for begin, end in self.student.question_blocks():
            yield self._block(whole, begin, end)

    def _block(self, whole: Windows, begin: int, end: int) -> dict[str, np.ndarray]:
        """The arrays for the student's windows begin to end - 1."""
        counts, template = self.counts, self.template
        question = self.student.question[begin:end].astype(np.int64)
        questions = np.arange(question[0], question[-1] + 1)
        local = question - questions[0]
        asked, kept = self._questions(whole, questions)
        low, size = self._contexts(whole, begin, end)
        room = self.max_seq_length - template.size - asked[local]
        stride = np.clip(room // 2, 1, self.doc_stride)
        per_window = 1 + -(-np.maximum(size - room, 0) // stride)

        window = np.repeat(np.arange(end - begin), per_window)
        number = ragged(0 * low, per_window)
        gaps = np.maximum(per_window - 1, 1)[window]
        spread = np.maximum(size - room, 0)[window]
        first = low[window] + number * spread // gaps
        count = np.minimum(size, room)[window]

        before, between, after = map(len, (template.before, template.between, template.after))
        question, local = question[window], local[window]
        base = whole.window_start[question]
        tail = base + whole.lengths[question] - after
        context = base + whole.prefix[question]
        of_all = np.ones_like(base)
        from_ = [base, base + before, context - between, context + first, tail]
        long = [before * of_all, asked[local], between * of_all, count, after * of_all]
        at = ragged(np.stack(from_, 1).ravel(), np.stack(long, 1).ravel())
        lengths = sum(long)
        ids = [name.encode() for name in whole.question_ids[questions[0] : questions[-1] + 1]]
        arrays = {
            "input_ids": whole.input_ids[at],
            "window_start": counts["tokens"] + starts_of(lengths)[1:],
            "lengths": lengths,
            "question": question,
            "context": whole.context[question],
            "first_token": first,
            "count": count,
            "prefix": before + asked[local] + between,
            "start_positions": UNLABELLED * of_all,
            "end_positions": UNLABELLED * of_all,
            "trainable": of_all,
            "question_token_start": counts["question_tokens"] + starts_of(asked)[1:],
            "question_char_start": whole.question_char_start[kept],
            "question_char_count": whole.question_char_count[kept],
            "question_id_start": self._id_bytes + starts_of([len(name) for name in ids])[1:],
            "question_id_bytes": np.frombuffer(b"".join(ids), dtype=np.uint8),
            "first_piece": counts["windows"] + starts_of(per_window)[1:],
        }
        self._id_bytes += sum(map(len, ids))
        counts["questions"] += len(questions)
        counts["windows"] += len(window)
        counts["tokens"] += len(at)
        counts["question_tokens"] += len(kept)
        return arrays

    def _questions(self, whole: Windows, questions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How many tokens each question keeps, int64 (n,), and the places of all in `whole`.

        Those that begin inside what the student reads of it, as far as half a window holds them.
        """
        ours = spans_of(self.student, "question", questions)
        theirs = spans_of(whole, "question", questions)
        asked = np.zeros(len(questions), dtype=np.int64)
        text = np.flatnonzero(np.diff(ours.starts))
        reach = ours.past[ours.starts[text + 1] - 1]
        asked[text] = theirs.beginning_after(text, reach - 1) - theirs.starts[text]
        most = (self.max_seq_length - self.template.size) // 2
        self.counts["truncated_questions"] += int((asked > most).sum())
        asked = np.minimum(asked, most)
        return asked, ragged(whole.question_token_start[questions], asked)

    def _contexts(self, whole: Windows, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's tokens of each student window's context: the first, and how many."""
        student, span = self.student, slice(begin, end)
        texts, local = np.unique(student.context[span], return_inverse=True)
        ours, theirs = (spans_of(windows, "context", texts) for windows in (student, whole))
        count = student.count[span]
        low, high = np.zeros((2, end - begin), dtype=np.int64)
        some = np.flatnonzero(count)
        text = local[some]
        first = ours.starts[text] + student.first_token[span][some]
        low[some] = theirs.ending_after(text, ours.first[first])
        high[some] = theirs.beginning_after(text, ours.past[first + count[some] - 1] - 1)
        low[some] -= theirs.starts[text]
        high[some] -= theirs.starts[text]
        return low, np.maximum(high - low, 0)
