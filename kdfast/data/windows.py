"""Windows: the model's inputs, flat and unpadded, mapped from files."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from kdfast.common.errors import UserError
from kdfast.common.files import read_json_object
from kdfast.config import WindowSettings
from kdfast.data.cache import ARRAYS, HEADER, UNLABELLED, PickledByPath, damaged, open_array
from kdfast.data.tally import Tally
from kdfast.data.validate import fault_of, fault_of_header
from kdfast.tokenizers.template import Template

# Arrays of Windows by name, each of them in parts.
Parts = Generator[dict[str, np.ndarray], None, None]


def check_settings(settings: WindowSettings, template: Template) -> None:
    """Raises UserError for settings under which some token of a context is in no window."""
    for name, value in vars(settings).items():
        if value < 1:
            raise UserError(f"--{name} {value}: give a positive number")
    room = settings.max_seq_length - settings.max_query_length - template.size
    if room < 1:
        raise UserError(
            f"--max_seq_length {settings.max_seq_length}: a question of --max_query_length "
            f"{settings.max_query_length} and {template.size} special tokens leave no room for a "
            "context: change one of them"
        )
    if settings.doc_stride > room:
        raise UserError(
            f"--doc_stride {settings.doc_stride}: more than the {room} tokens that "
            f"--max_seq_length {settings.max_seq_length} leaves for the context next to a question "
            f"of --max_query_length {settings.max_query_length} and {template.size} special "
            "tokens, so that windows would leave gaps: change one of them"
        )


class Texts(PickledByPath, Sequence[str]):
    """Strings stored as one run of UTF-8 bytes: `starts` int64 (n + 1,), `data` uint8."""

    def __init__(self, starts: np.ndarray, data: np.ndarray):
        self._starts, self._data = starts, data

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self._data[self._starts[index] : self._starts[index + 1]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


class Windows(PickledByPath):
    """W windows over Q questions and C contexts; windows in the order of the questions.

    A window is special tokens, question, special tokens, a run of its context, special tokens.

    Attributes:
        input_ids: uint16, or int32 where an id needs it, (tokens,). All windows after one another,
            without padding.
        window_start: int64 (W + 1,). Where each window begins in input_ids.
        lengths: int32 (W,). Tokens of each window.
        question, context: int32 (W,). The numbers of its question and of its context.
        first_token, count: int32 (W,). The window holds `count` of its context's tokens, from
            `first_token` on.
        prefix: int32 (W,). The position in the window at which the context begins.
        start_positions, end_positions: int32 (W,). The answer's first and last token, as positions
            in the window; 0: no answer in this window; -100: unlabelled question.
        trainable: bool (W,). False where the question's answer has no place in its context, or no
            window holds it whole.
        question_token_start, context_token_start: int64 (Q + 1,) and (C + 1,). Where the tokens of
            each question and context begin in the four arrays below.
        question_char_start, context_char_start: uint16, or int32 where needed. Each token's first
            character, leading blanks left out.
        question_char_count, context_char_count: uint8, uint16 or int32. Each token's characters.
        question_ids: Q strings.
        pad_token_id: the token that fills a batch.
        uses_token_types: token type 1 from `prefix` to the window's end, else all are 0.
        key: hex, names the content.
        settings: what the windows were cut by.
        tally: of how many questions something is true, see `notes`.
        counts: those of the tally.
    """

    input_ids: np.ndarray
    window_start: np.ndarray
    lengths: np.ndarray
    question: np.ndarray
    context: np.ndarray
    first_token: np.ndarray
    count: np.ndarray
    prefix: np.ndarray
    start_positions: np.ndarray
    end_positions: np.ndarray
    trainable: np.ndarray
    question_token_start: np.ndarray
    question_char_start: np.ndarray
    question_char_count: np.ndarray
    context_token_start: np.ndarray
    context_char_start: np.ndarray
    context_char_count: np.ndarray

    def __init__(self, arrays: dict[str, np.ndarray], header: dict[str, Any]):
        for name in ARRAYS:
            setattr(self, name, arrays[name])
        self.question_ids = Texts(arrays["question_id_start"], arrays["question_id_bytes"])
        self.key: str = header["key"]
        self.settings: dict[str, Any] = header["settings"]
        self.tally = Tally(header["counts"], header["first"])
        self.counts = self.tally.counts
        self.pad_token_id: int = header["pad_token_id"]
        self.uses_token_types: bool = header["uses_token_types"]

    def __len__(self) -> int:
        return len(self.lengths)

    def with_token_types(self, used: bool) -> Windows:
        """The same windows for a model that reads the tokenizer's token types, or all 0."""
        others = Windows.__new__(Windows)
        vars(others).update(vars(self), uses_token_types=used)
        return others

    def without_labels(self) -> Windows:
        """The same windows of questions of which nobody has said the answer."""
        others = Windows.__new__(Windows)
        none = np.full(len(self), UNLABELLED, dtype=np.int32)
        own = {"start_positions": none, "end_positions": none}
        vars(others).update(vars(self), trainable=np.ones(len(self), dtype=bool), **own)
        return others

    def padded(self, indices: Any, width: int | None = None) -> dict[str, np.ndarray]:
        """The given windows as a batch, padded on the right.

        Args:
            indices: n window numbers, any order.
            width: of the result; that of the longest of them if None.

        Returns:
            input_ids int64 (n, width), attention_mask bool (n, width), token_type_ids int64
            (n, width), all 0 unless uses_token_types.

        Raises:
            ValueError: where a window is longer than width.
        """
        indices = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[indices]
        longest = int(lengths.max(initial=0))
        if width is None:
            width = longest
        elif width < longest:
            raise ValueError(f"width {width} is less than the longest window's {longest}")
        position = np.arange(width)
        mask = position < lengths[:, None]
        place = np.where(mask, self.window_start[indices][:, None] + position, 0)
        ids = np.where(mask, self.input_ids[place].astype(np.int64), self.pad_token_id)
        types = np.zeros_like(ids)
        if self.uses_token_types:
            types[mask & (position >= self.prefix[indices][:, None])] = 1
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}

    def char_span(self, window: Any, start: Any, end: Any) -> tuple[Any, Any]:
        """The characters of a span of tokens: context[first:past] of the window's context.

        Args:
            window: window numbers, one or an array.
            start, end: positions in the window of the span's first and last token, of the same
                shape. Both must be context tokens, which is not checked.

        Returns:
            first and past, int64 of that shape.
        """
        base = (
            self.context_token_start[self.context[window]]
            + self.first_token[window]
            - self.prefix[window]
        )
        first, last = (self.context_char_start[base + at].astype(np.int64) for at in (start, end))
        return first, last + self.context_char_count[base + end]

    def question_blocks(self, questions: int = 256) -> Iterator[tuple[int, int]]:
        """Cuts the windows into runs, (begin, end), of so many whole questions each."""
        begin = 0
        while begin < len(self):
            end = int(np.searchsorted(self.question, self.question[begin] + questions))
            yield begin, end
            begin = end

    def notes(self, training: bool = True) -> list[str]:
        """What a user should hear about these windows, a sentence for each thing.

        Args:
            training: also what concerns the labels that training uses.
        """
        return self.tally.notes(self.settings, training)


def open_windows(folder: Path, key: str) -> Windows:
    """The windows in a finished folder, mapped.

    The arrays are read once to check that no index in them leads out of another array, and no label
    out of its window.

    Raises:
        UserError: where one does, and for a file that is missing, shortened or of another key.
    """
    header = read_json_object(folder / HEADER)
    if header.get("key") != key:
        raise damaged(folder, f"{HEADER} is not that of {key}")
    arrays = {name: open_array(folder, name, kinds) for name, kinds in ARRAYS.items()}
    if fault := fault_of_header(header) or fault_of(arrays):
        raise damaged(folder, fault)
    return Windows(arrays, header)
