"""Questions and contexts to windows: the arrays, chunk by chunk, without holding them all."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from kdfast.common.errors import UserError
from kdfast.config import WindowSettings
from kdfast.data.cache import UNLABELLED
from kdfast.data.chunks import Chunk, Joiner
from kdfast.data.examples import Example
from kdfast.data.labels import find_labels, placed
from kdfast.data.tally import Tally
from kdfast.tokenizers.encode import Tokens, ragged, starts_of
from kdfast.tokenizers.template import Template, whole_texts

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# Of the contexts of a batch; of all its questions' contexts, which its windows grow with.
_BATCH_CHARACTERS = 1 << 19
_BATCH_CHARACTERS_ASKED = 1 << 22
_BATCH_QUESTIONS = 4096


@dataclass(frozen=True)
class _Batch:
    """Questions and the contexts that they are about.

    first: the number of the first question. texts: the contexts that no earlier batch had, in their
    order, numbered from `first_new` on. old: contexts of earlier batches by their numbers. local
    int64 (questions,): each question's context, counted in texts and then in old.
    """

    examples: list[Example]
    first: int
    texts: list[str]
    first_new: int
    old: dict[int, str]
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
        joiner = Joiner(self.tally)
        yield joiner.heads()
        for _, chunk in self.chunks(examples):
            assert chunk is not None
            yield joiner.join(chunk)

    def chunks(
        self, examples: Iterable[Example], is_wanted: Callable[[int], bool] = lambda number: True
    ) -> Iterator[tuple[int, Chunk | None]]:
        """Yields the windows of each batch with its number, from 0; None if it is not wanted.

        The cut into batches depends on the examples alone. Of a batch that is not wanted nothing
        is tokenised.
        """
        self._known: dict[bytes, int] = {}
        self._spooled = [0]
        first = 0
        with whole_texts(self.tokenizer) as backend:
            for number, examples_of in enumerate(_batches(examples)):
                batch = self._plan(examples_of, first)
                first += len(examples_of)
                if is_wanted(number):
                    yield number, self._chunk(batch, backend)
                else:
                    self._spooled.extend(self._spooled[-1:] * len(batch.texts))
                    yield number, None

    def _plan(self, examples: list[Example], first: int) -> _Batch:
        """Tells new contexts from known ones."""
        first_new = len(self._known)
        seen: set[int] = set()
        old: dict[int, str] = {}
        texts, met, last = [], [], None
        for example in examples:
            if example.context is not last:
                last = example.context
                name = hashlib.blake2b(last.encode(), digest_size=16).digest()
                number = self._known.setdefault(name, len(self._known))
                if number not in seen:
                    seen.add(number)
                    if number >= first_new:
                        texts.append(last)
                    else:
                        old[number] = last
            met.append(number)
        order = {number: i for i, number in enumerate(old, len(texts))}
        local = [n - first_new if n >= first_new else order[n] for n in met]
        return _Batch(examples, first, texts, first_new, old, np.array(local))

    def _contexts(self, batch: _Batch, backend: Tokenizer) -> tuple[Tokens, Tokens]:
        """The tokens of a batch's new contexts, which are kept, and those of all its contexts."""
        new = Tokens.encode(backend, batch.texts).exact(batch.texts)
        self._spooled.extend((self._spooled[-1] + new.starts[1:]).tolist())
        self.spool.seek(0, io.SEEK_END)
        self.spool.write(np.column_stack([new.ids, new.offsets]).astype(np.int32).tobytes())
        if not batch.old:
            return new, new
        recalled = {number: self._recall(number) for number in batch.old}
        # Those that only batches had which were not wanted.
        lacking = [number for number, tokens in recalled.items() if not len(tokens)]
        texts = [batch.old[number] for number in lacking]
        again = Tokens.encode(backend, texts).exact(texts)
        values = np.column_stack([again.ids, again.offsets])
        for number, start, end in zip(lacking, again.starts, again.starts[1:], strict=False):
            recalled[number] = values[start:end]
        everything = np.concatenate(list(recalled.values()))
        return new, Tokens(
            starts_of([*np.diff(new.starts), *map(len, recalled.values())]),
            np.concatenate([new.ids, everything[:, 0]]),
            np.concatenate([new.offsets, everything[:, 1:]]),
        )

    def _recall(self, number: int) -> np.ndarray:
        """int32 (n, 3): the id and the characters of each token of an earlier context."""
        start, end = self._spooled[number : number + 2]
        self.spool.seek(12 * start)
        return np.frombuffer(self.spool.read(12 * (end - start)), dtype=np.int32).reshape(-1, 3)

    def _chunk(self, plan: _Batch, backend: Tokenizer) -> Chunk:
        tally, template, limit = Tally(), self.template, self.settings.max_query_length
        batch, local, fresh = plan.examples, plan.local, len(plan.texts)
        texts = [example.question for example in batch]
        # One token more than is kept tells which questions were cut.
        questions = Tokens.encode(backend, texts, limit + 1)
        new, contexts = self._contexts(plan, backend)
        questions = questions.exact(texts)
        numbers = np.array([*range(plan.first_new, plan.first_new + fresh), *plan.old])
        asked = np.minimum(np.diff(questions.starts), limit)
        for i in np.flatnonzero(np.diff(questions.starts) > limit):
            tally.add("truncated_questions", batch[i].id)
        kept = ragged(questions.starts[:-1], asked)
        questions = Tokens(starts_of(asked), questions.ids[kept], questions.offsets[kept])
        first, last, trainable = find_labels(batch, contexts, local, tally)

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
            tally.add("longer_than_window", batch[i].id)
        unlabelled = first[q] == UNLABELLED
        id_bytes = [e.id.encode() for e in batch]
        arrays = {
            "input_ids": ids,
            "window_start": starts_of(lengths)[1:],
            "lengths": lengths,
            "question": q,
            "context": numbers[local[q]],
            "first_token": begin,
            "count": count,
            "prefix": prefix,
            "start_positions": placed(prefix + first[q] - begin, inside, unlabelled),
            "end_positions": placed(prefix + last[q] - begin, inside, unlabelled),
            "trainable": trainable[q],
            "question_token_start": questions.starts[1:],
            "question_char_start": questions.offsets[:, 0],
            "question_char_count": questions.offsets[:, 1] - questions.offsets[:, 0],
            "context_token_start": new.starts[1:],
            "context_char_start": new.offsets[:, 0],
            "context_char_count": new.offsets[:, 1] - new.offsets[:, 0],
            "question_id_start": starts_of([len(b) for b in id_bytes])[1:],
            "question_id_bytes": np.frombuffer(b"".join(id_bytes), dtype=np.uint8),
        }
        tally.counts |= {
            "questions": len(batch),
            "contexts": fresh,
            "windows": len(q),
            "tokens": len(ids),
            "context_tokens": len(new.ids),
            "question_tokens": len(questions.ids),
        }
        return Chunk(plan.first, arrays, tally)

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
