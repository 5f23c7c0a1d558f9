"""A student's windows as another tokenizer cuts them: same question, same characters of context."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdfast.data.cache import Kinds, cache_folder, damaged, open_array
from kdfast.data.examples import Example
from kdfast.data.prepare import Parts, cached_windows, prepare_windows
from kdfast.data.windows import Windows, WindowSettings
from kdfast.teachers.rewindow import Recutter
from kdfast.tokenizers.template import Template, tokenizer_key

FORMAT = 1  # part of every key: raise it when files or meaning change
# Settings under which every question is one window, with the whole of its context.
WHOLE = WindowSettings(max_seq_length=1 << 30, max_query_length=1 << 29, doc_stride=1)
FIRST: dict[str, Kinds] = {"first_piece": (np.int64,)}


@dataclass(frozen=True)
class Pieces:
    """Windows of a teacher's tokenizer, one or several for each window of a student, in its order.

    windows: they are unlabelled. first int64 (W + 1,): the student's window w is read in windows
    first[w] to first[w + 1] - 1.
    """

    windows: Windows
    first: np.ndarray


def prepare(
    student: Windows,
    source: str,
    tokenizer: Any,
    *,
    max_seq_length: int,
    doc_stride: int,
    cache_dir: Path | str,
    split: str | None = None,
    progress: Callable[[Iterable[Example]], Iterable[Example]] = iter,
) -> Pieces:
    """The pieces of `student`, windows that were prepared from `source`; from the cache if there.

    A window's piece holds the tokens that stand for any of its characters. One that is longer than
    max_seq_length is read in several pieces of full length, evenly spread, which begin at most
    doc_stride tokens, or half of their context, apart. A question takes half of a piece at most
    and loses the rest; windows.counts["truncated_questions"] says how many do.

    The cache is a folder of cache_dir/features, keyed by the student's windows, the tokenizer and
    the settings. Raises UserError as prepare_windows does.
    """
    template = Template.learn(tokenizer)
    settings = {"max_seq_length": max_seq_length, "doc_stride": doc_stride}
    parts = [FORMAT, "pieces", student.key, tokenizer_key(tokenizer), settings]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    recutter = Recutter(student, template, **settings)

    def arrays(folder: Path) -> Parts:
        whole = prepare_windows(
            source, tokenizer, WHOLE, cache_dir=cache_dir, split=split, progress=progress
        )
        yield from recutter.arrays(whole)

    def header() -> dict[str, Any]:
        return {
            "key": key,
            "format": FORMAT,
            "settings": settings,
            "pad_token_id": template.pad_token_id,
            "uses_token_types": template.uses_token_types,
            "counts": recutter.counts,
            "first": {},
        }

    windows = cached_windows(cache_dir, key, arrays, header, more=FIRST)
    folder = cache_folder(cache_dir, key)
    first = open_array(folder, "first_piece", FIRST["first_piece"])
    if len(first) != len(student) + 1:
        raise damaged(folder, f"first_piece has {len(first)} entries, not {len(student) + 1}")
    return Pieces(windows, first)
