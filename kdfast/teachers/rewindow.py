"""Pieces cut out of whole questions and contexts, as pieces.py describes them, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from kdfast.data.cache import UNLABELLED
from kdfast.data.windows import Windows
from kdfast.teachers.characters import spans_of
from kdfast.tokenizers.encode import ragged, starts_of
from kdfast.tokenizers.template import Template

_VALUES_AT_ONCE = 1 << 20


@dataclass
class Recutter:
    """Cuts the student's windows anew out of another tokenizer's windows of whole contexts.

    template: of the other tokenizer. max_seq_length: of a piece. doc_stride: from the start of a
    piece to that of the next, at most.
    """

    student: Windows
    template: Template
    max_seq_length: int
    doc_stride: int
    counts: dict[str, int] = field(default_factory=dict)

    def arrays(self, whole: Windows) -> Iterator[dict[str, np.ndarray]]:
        """Yields the arrays of Windows in parts, and `first_piece`, which is Pieces.first.

        whole: one window for each question that the student's windows are about.
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

        Those that begin inside what the student reads of it, as far as half a piece holds them.
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
        """The other tokenizer's tokens of each student window's context: first, and how many."""
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
