"""Questions and contexts to windows: the arrays, batch by batch, without holding them all."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from kdfast.common.errors import UserError
from kdfast.config import WindowSettings
from kdfast.data.cache import UNLABELLED
from kdfast.data.examples import Example, Lost, first_place
from kdfast.data.tally import COUNTED, Tally
from kdfast.tokenizers.encode import Tokens, ragged, starts_of
from kdfast.tokenizers.template import Template, whole_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Of the contexts of a batch; of all its questions' contexts, which its windows grow with.
_BATCH_CHARACTERS = 1 << 19
_BATCH_CHARACTERS_ASKED = 1 << 22
_BATCH_QUESTIONS = 4096


@dataclass(frozen=True)
class _Batch:
    """Questions and the contexts that they are about.

    texts: the contexts that no earlier batch had, in their order, numbered from `first_new` on.
    old: numbers of contexts of earlier batches. local int64 (questions,): each question's context,
    counted in texts and then in old.
    """

    examples: list[Example]
    texts: list[str]
    first_new: int
    old: list[int]
    local: np.ndarray


@dataclass
class WindowBuilder:
    """Cuts windows out of examples.

    Args:
        tokenizer: a fast one.
        template: the tokenizer's.
        settings: how the windows are cut.
        overlap: where given, it replaces settings.doc_stride: each window begins with the last
            `overlap` context tokens of the one before it, or with half a window where a question
            leaves no room for more.
        spool: a file that keeps the tokens of the contexts seen so far, so that a context which
            comes back later is not tokenised again. It is of no use afterwards.
        tally: counts what a user should hear of the questions.
    """

    tokenizer: PreTrainedTokenizerFast
    template: Template
    settings: WindowSettings
    overlap: int | None = None
    spool: BinaryIO = field(default_factory=io.BytesIO)
    tally: Tally = field(default_factory=Tally)

    def arrays(self, examples: Iterable[Example]) -> Iterator[dict[str, np.ndarray]]:
        """Yields dictionaries whose arrays, joined over all of them by name, are those of Windows.

        Memory: that of a batch of about half a million characters, plus 16 bytes and a dictionary
        entry for each context.
        """
        names = ("questions", "contexts", "windows", "tokens", "context_tokens", "question_tokens")
        self.tally.counts.update(dict.fromkeys((*names, *COUNTED, "unanswerable"), 0))
        self._known: dict[bytes, int] = {}
        self._spooled = [0]
        self._id_bytes = 0
        zero = np.zeros(1, dtype=np.int64)
        heads = ("window_start", "question_token_start", "context_token_start", "question_id_start")
        yield dict.fromkeys(heads, zero)
        with whole_texts(self.tokenizer.backend_tokenizer) as backend:
            for batch in _batches(examples):
                plan = self._plan(batch)
                asked = [example.question for example in batch]
                # One token more than is kept tells which questions were cut.
                questions = Tokens.encode(backend, asked, self.settings.max_query_length + 1)
                contexts = Tokens.encode(backend, plan.texts).exact(plan.texts)
                yield self._batch(plan, contexts, questions.exact(asked))

    def _plan(self, examples: list[Example]) -> _Batch:
        """Tells new contexts from known ones."""
        first_new = len(self._known)
        places: dict[int, int] = {}  # of contexts, in the order in which they are met
        texts, met, last = [], [], None
        for example in examples:
            if example.context is not last:
                last = example.context
                name = hashlib.blake2b(last.encode(), digest_size=16).digest()
                number = self._known.setdefault(name, len(self._known))
                if number not in places:
                    places[number] = len(places)
                    if number >= first_new:
                        texts.append(last)
            met.append(number)
        old = [number for number in places if number < first_new]
        order = {number: i for i, number in enumerate(old, len(texts))}
        local = [n - first_new if n >= first_new else order[n] for n in met]
        return _Batch(examples, texts, first_new, old, np.array(local))

    def _with_recalled(self, batch: _Batch, new: Tokens) -> Tokens:
        """The tokens of all contexts of a batch, from those of its new ones, which are kept."""
        self._spooled.extend((self._spooled[-1] + new.starts[1:]).tolist())
        self.spool.seek(0, io.SEEK_END)
        self.spool.write(np.column_stack([new.ids, new.offsets]).astype(np.int32).tobytes())
        if not batch.old:
            return new
        recalled = [self._recall(number) for number in batch.old]
        return Tokens(
            starts_of([*np.diff(new.starts), *map(len, recalled)]),
            np.concatenate([new.ids, *(r[:, 0] for r in recalled)]),
            np.concatenate([new.offsets, *(r[:, 1:] for r in recalled)]),
        )

    def _recall(self, number: int) -> np.ndarray:
        """int32 (n, 3): the id and the characters of each token of an earlier context."""
        start, end = self._spooled[number : number + 2]
        self.spool.seek(12 * start)
        return np.frombuffer(self.spool.read(12 * (end - start)), dtype=np.int32).reshape(-1, 3)

    def _batch(self, plan: _Batch, new: Tokens, questions: Tokens) -> dict[str, np.ndarray]:
        counts, template, limit = self.tally.counts, self.template, self.settings.max_query_length
        batch, local, fresh = plan.examples, plan.local, len(plan.texts)
        numbers = np.array([*range(plan.first_new, plan.first_new + fresh), *plan.old])
        contexts = self._with_recalled(plan, new)
        asked = np.minimum(np.diff(questions.starts), limit)
        for i in np.flatnonzero(np.diff(questions.starts) > limit):
            self.tally.add("truncated_questions", batch[i].id)
        kept = ragged(questions.starts[:-1], asked)
        questions = Tokens(starts_of(asked), questions.ids[kept], questions.offsets[kept])
        first, last, trainable = self._labels(batch, contexts, local)

        size = np.diff(contexts.starts)[local]
        room = self.settings.max_seq_length - template.size - asked
        step = self._steps(batch, size, room)
        per_question = 1 + -(-np.maximum(size - room, 0) // step)
        q = np.repeat(np.arange(len(batch)), per_question)
        begin = step[q] * ragged(np.zeros(len(batch), dtype=np.int64), per_question)
        count = np.minimum(size[q] - begin, room[q])
        prefix = len(template.before) + asked[q] + len(template.between)
        lengths = prefix + count + len(template.after)

        # Five runs a window, all taken from one array: special tokens, questions, contexts.
        special = np.array([*template.before, *template.between, *template.after], dtype=np.int32)
        source = np.concatenate([special, questions.ids, contexts.ids])
        at_question = len(special) + questions.starts[q]
        at_context = len(special) + len(questions.ids) + contexts.starts[local[q]] + begin
        sizes = [len(template.before), len(template.between), len(template.after)]
        same = np.ones(len(q), dtype=np.int64)
        from_ = [0 * same, at_question, sizes[0] * same, at_context, (sizes[0] + sizes[1]) * same]
        long = [sizes[0] * same, asked[q], sizes[1] * same, count, sizes[2] * same]
        ids = source[ragged(np.stack(from_, 1).ravel(), np.stack(long, 1).ravel())]

        inside = (first[q] >= begin) & (last[q] < begin + count)
        held = np.bincount(q[inside], minlength=len(batch)) > 0
        for i in np.flatnonzero((first >= 0) & ~held):
            trainable[i] = False
            self.tally.add("longer_than_window", batch[i].id)
        unlabelled = first[q] == UNLABELLED
        id_bytes = [e.id.encode() for e in batch]
        arrays = {
            "input_ids": ids,
            "window_start": counts["tokens"] + starts_of(lengths)[1:],
            "lengths": lengths,
            "question": counts["questions"] + q,
            "context": numbers[local[q]],
            "first_token": begin,
            "count": count,
            "prefix": prefix,
            "start_positions": _label(prefix + first[q] - begin, inside, unlabelled),
            "end_positions": _label(prefix + last[q] - begin, inside, unlabelled),
            "trainable": trainable[q],
            "question_token_start": counts["question_tokens"] + questions.starts[1:],
            "question_char_start": questions.offsets[:, 0],
            "question_char_count": questions.offsets[:, 1] - questions.offsets[:, 0],
            "context_token_start": counts["context_tokens"] + new.starts[1:],
            "context_char_start": new.offsets[:, 0],
            "context_char_count": new.offsets[:, 1] - new.offsets[:, 0],
            "question_id_start": self._id_bytes + starts_of([len(b) for b in id_bytes])[1:],
            "question_id_bytes": np.frombuffer(b"".join(id_bytes), dtype=np.uint8),
        }
        self._id_bytes += sum(map(len, id_bytes))
        counts["questions"] += len(batch)
        counts["contexts"] += fresh
        counts["windows"] += len(q)
        counts["tokens"] += len(ids)
        counts["context_tokens"] += len(new.ids)
        counts["question_tokens"] += len(questions.ids)
        return arrays

    def _steps(self, batch: list[Example], size: np.ndarray, room: np.ndarray) -> np.ndarray:
        """The tokens from the start of a question's window to that of its next one.

        size: tokens of its context; room: those of them that fit in a window. Where the overlap
        takes all of the room, half of it is shared. Raises UserError where there is no room.
        """
        if self.overlap is None:
            return np.full(len(batch), self.settings.doc_stride)
        full = np.flatnonzero((size > room) & (room < 1))
        if len(full):
            raise UserError(
                f"the question {batch[full[0]].question[:80]!r} leaves 0 of "
                f"{self.settings.max_seq_length} tokens for its context: give a smaller "
                "max_question_len or a larger max_seq_len"
            )
        step = room - self.overlap
        return np.maximum(np.where(step < 1, room - room // 2, step), 1)

    def _labels(
        self, batch: list[Example], contexts: Tokens, local: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First and last token of each question's first answer that has a place in its context.

        Counted in the context. Both are -1 where there is no answer, or none that training may use
        (then trainable is False), and UNLABELLED where nobody said.

        The first token is the first one that ends after the answer's first character, the last
        token the last one that begins before its end: the tokens that hold the answer's outer
        characters, where any does.
        """
        n = len(batch)
        labelled = np.ones(n, dtype=bool)
        answered = np.zeros(n, dtype=bool)
        trainable = np.ones(n, dtype=bool)
        span = np.zeros((n, 2), dtype=np.int64)
        for i, example in enumerate(batch):
            if example.answers is None:
                labelled[i] = False
            elif example.answers:
                found = first_place(example.context, example.answers)
                if isinstance(found, Lost):
                    trainable[i] = False
                    self.tally.add(found.value, example.id)
                    continue
                number, place = found
                answered[i] = True
                span[i] = place.start, place.end
                if number:
                    self.tally.add("later_answer", example.id)
                if place.moved:
                    self.tally.add("moved", example.id)
        # All contexts searched at once: each gets a range of keys of its own. The running maximum
        # keeps the keys sorted where a token begins before an earlier one.
        wide = 1 + max(len(e.context) for e in batch)
        owner = wide * np.repeat(np.arange(len(contexts.starts) - 1), np.diff(contexts.starts))
        ends = np.maximum.accumulate(owner + contexts.offsets[:, 1])
        begins = np.maximum.accumulate(owner + contexts.offsets[:, 0])
        base = contexts.starts[local]
        first = np.searchsorted(ends, wide * local + span[:, 0], side="right") - base
        last = np.searchsorted(begins, wide * local + span[:, 1], side="left") - 1 - base
        # No token holds any of it: characters that the tokenizer drops.
        lost = answered & ~((first >= 0) & (first <= last))
        trainable[lost] = False
        answered &= ~lost
        for unheld in np.flatnonzero(lost):
            self.tally.add("no_token", batch[unheld].id)
        self.tally.counts["unlabelled"] += int((~labelled).sum())
        self.tally.counts["unanswerable"] += int((labelled & ~answered & trainable).sum())
        none = np.where(labelled, -1, UNLABELLED)
        return np.where(answered, first, none), np.where(answered, last, none), trainable


def _label(position: np.ndarray, inside: np.ndarray, unlabelled: np.ndarray) -> np.ndarray:
    return np.where(unlabelled, UNLABELLED, np.where(inside, position, 0))


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Cuts a stream where a batch is as large as its memory may grow."""
    batch: list[Example] = []
    distinct, asked, last = 0, 0, None
    for example in examples:
        new = 0 if example.context is last else len(example.context)
        full = (
            (new and distinct >= _BATCH_CHARACTERS)
            or asked >= _BATCH_CHARACTERS_ASKED
            or len(batch) >= _BATCH_QUESTIONS
        )
        if full:
            yield batch
            batch, distinct, asked = [], 0, 0
            new = len(example.context)
        batch.append(example)
        distinct, asked = distinct + new, asked + len(example.context)
        last = example.context
    if batch:
        yield batch
