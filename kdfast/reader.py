"""kdfast.Reader: questions and contexts to answers, as the pipeline of transformers 4 gave them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kdfast.distill import models
from kdfast.distill.costs import forward_tokens
from kdfast.distill.feed import flat_positions, forward_windows
from kdfast.distill.precision import AUTOCAST, pick_device, resolve
from kdfast.errors import UserError
from kdfast.squad.batches import cut_by_tokens
from kdfast.squad.examples import Example
from kdfast.squad.features import windows_of
from kdfast.squad.pipeline import pipeline_answers
from kdfast.squad.questions import Pair, pairs_of
from kdfast.squad.words import Words

# Characters of questions and contexts that are in work at once: their windows bound the memory.
CHUNK_CHARACTERS = 1 << 21

Answers = dict | list[dict]


@dataclass(frozen=True)
class ReaderSettings:
    """How questions are answered: the arguments of Reader.__call__, which describes them."""

    top_k: int = 1
    handle_impossible_answer: bool = False
    max_answer_len: int = 15
    max_question_len: int = 64
    max_seq_len: int | None = None
    doc_stride: int | None = None
    align_to_words: bool = True

    def check(self) -> None:
        """Raise UserError for a number that is none or out of range."""
        for name in ("top_k", "max_answer_len", "max_question_len", "max_seq_len", "doc_stride"):
            value, least = getattr(self, name), int(name != "doc_stride")
            if value is None and name in ("max_seq_len", "doc_stride"):
                continue
            if not isinstance(value, int) or value < least:
                raise UserError(f"{name} is {value!r}: give a whole number of at least {least}.")


class Reader:
    """A reader, ready to answer questions; it stands in for pipeline("question-answering").

    model: a folder that save_pretrained has written, or a hub id. device: a torch device or its
    name; None takes the GPU where there is one, else the CPU. mixed_precision: "no", "fp16" or
    "bf16"; "no" gives the scores of transformers 4, the others are faster on a GPU.

    Raises UserError for a model that does not load or has no question-answering head.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str | torch.device | None = None,
        mixed_precision: str = "no",
    ):
        self.name = str(model)
        self.device = pick_device() if device is None else _usable(device)
        loaded = models.load_reader(self.name, "model")
        self.tokenizer = loaded.tokenizer
        self.notes = loaded.notes
        self._longest = models.longest_input(loaded, self.name)
        if mixed_precision not in AUTOCAST:
            raise UserError(
                f"mixed_precision is {mixed_precision!r}: give one of {', '.join(AUTOCAST)}."
            )
        self._precision = AUTOCAST[resolve(mixed_precision, self.device)]
        self.model = loaded.model.to(self.device).eval()

    def __call__(
        self,
        *inputs,
        question: str | list[str] | None = None,
        context: str | list[str] | None = None,
        top_k: int = 1,
        handle_impossible_answer: bool = False,
        max_answer_len: int = 15,
        max_question_len: int = 64,
        max_seq_len: int | None = None,
        doc_stride: int | None = None,
        align_to_words: bool = True,
    ) -> Answers | list[Answers]:
        """Answer questions, each in its context, as QuestionAnsweringPipeline of transformers 4.

        The questions: question= and context= (two texts, two lists of one length, or a list of
        questions and the one context of all), or a dict {"question", "context"}, an iterable or
        several of them, or two texts. The result belongs to the only question, or is a list with
        one result a question. A result is {"score", "start", "end", "answer"}, where answer is
        context[start:end], or a list of these, best first, where there are several of them.

        top_k: answers to a question, fewer where its context has not as many.
        handle_impossible_answer: let "" compete, with the probability that there is no answer.
        max_answer_len: tokens in the longest answer considered.
        max_question_len: tokens of a question that are kept. (transformers 4 said so too, but with
            a fast tokenizer never cut a question, and failed at a very long one.)
        max_seq_len: tokens in a window, special ones included; None means 384, or fewer where the
            model reads fewer.
        doc_stride: context tokens that two windows of one question share. This is the pipeline's
            meaning; in training and evaluation doc_stride is the step from window to window. None
            means 128, or half of max_seq_len where that is less.
        align_to_words: widen answers to whole words, as the tokenizer splits words. As there, an
            answer's characters are those its tokens stand for, so that some tokenizers leave out a
            combining mark at its end.

        Scores, and how they are summed over equal texts, are described in
        squad.pipeline.pipeline_answers. The search is exact, over all spans of every window.

        Raises UserError for a question or a context that is empty or no text, for an argument out
        of range, and for logits that are NaN or infinite.
        """
        settings = ReaderSettings(
            top_k,
            handle_impossible_answer,
            max_answer_len,
            max_question_len,
            max_seq_len,
            doc_stride,
            align_to_words,
        )
        results = list(self.stream(pairs_of(inputs, question, context), settings))
        return results[0] if len(results) == 1 else results

    def stream(
        self,
        pairs: Iterable[Pair],
        settings: ReaderSettings,
        progress: Callable[[float], object] | None = None,
    ) -> Iterator[Answers]:
        """Yields one result a (question, context), in order, holding few of them in memory.

        progress: is told how many questions were answered since it was last told; the windows of
        a question are its fractions.
        """
        settings.check()
        max_seq_len = settings.max_seq_len or min(
            384, self.tokenizer.model_max_length, self._longest
        )
        if max_seq_len > self._longest:
            raise UserError(
                f"max_seq_len is {max_seq_len}, and {self.name} reads {self._longest} tokens at "
                "most: give a smaller one."
            )
        overlap = settings.doc_stride
        if overlap is None:
            overlap = min(max_seq_len // 2, 128)
        for chunk in _chunks(pairs):
            yield from self._answer(chunk, settings, max_seq_len, overlap, progress)

    def _answer(self, chunk, settings, max_seq_len, overlap, progress) -> list[Answers]:
        contexts = [context for _, context in chunk]
        number = {context: n for n, context in enumerate(dict.fromkeys(contexts))}
        windows = windows_of(
            # An error about a question names its id.
            (Example(question[:80], "", question, context, None) for question, context in chunk),
            self.tokenizer,
            max_seq_length=max_seq_len,
            max_query_length=settings.max_question_len,
            overlap=overlap,
        )
        logits = np.empty((len(windows.input_ids), 2), dtype=np.float32)
        batches = cut_by_tokens(
            np.arange(len(windows)), windows.lengths, forward_tokens(self.device)
        )
        for indices, rows in forward_windows(
            self.model, windows, batches, self.device, self._precision
        ):
            logits[flat_positions(windows, indices)] = rows
            if progress is not None:
                progress(len(chunk) * len(indices) / len(windows))
        return pipeline_answers(
            windows,
            logits,
            contexts,
            Words.encode(self.tokenizer, list(number)),
            np.array([number[context] for context in contexts]),
            top_k=settings.top_k,
            handle_impossible_answer=settings.handle_impossible_answer,
            max_answer_len=settings.max_answer_len,
            align_to_words=settings.align_to_words,
        )


def _usable(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise UserError(
            f"device {str(device)!r} cannot be used ({models.first_line(error)}): name another."
        ) from None


def _chunks(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """Consecutive pairs of about CHUNK_CHARACTERS together, at least one."""
    chunk: list[Pair] = []
    size = 0
    for pair in pairs:
        chunk.append(pair)
        size += len(pair[0]) + len(pair[1])
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
