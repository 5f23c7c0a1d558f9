"""kdfast.Reader: questions and contexts to answers, as the pipeline of transformers 4 gave them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from types import GeneratorType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from kdfast.common.device import device_of, place
from kdfast.common.errors import UserError
from kdfast.config import WindowSettings
from kdfast.data.batches import cut_by_tokens
from kdfast.data.examples import Example
from kdfast.data.pairs import Pair, chunks_of, pair_of, pairs_of
from kdfast.data.prepare import windows_of
from kdfast.data.windows import Windows
from kdfast.evaluation.pipeline_answers import Answers, pipeline_answers
from kdfast.evaluation.reader_settings import ReaderSettings
from kdfast.models.checks import check_type
from kdfast.models.dtype import asked_precision, change_type
from kdfast.models.hub import local_folder
from kdfast.models.inference import Room, forward_tokens, forward_windows
from kdfast.models.load import Loaded, load_reader, longest_input, span_model_of
from kdfast.models.structure import span_head_name
from kdfast.models.window_loader import flat_positions
from kdfast.tokenizers.load import load_tokenizer
from kdfast.tokenizers.template import Template
from kdfast.tokenizers.word_offsets import WordOffsets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Characters of questions and contexts that are in work at once: their windows bound the memory.
CHUNK_CHARACTERS = 1 << 21


class Reader:
    """A reader, ready to answer questions; it stands in for pipeline("question-answering").

    Args:
        model: A folder that save_pretrained has written, a hub id, or a model of transformers,
            which is moved to the device.
        tokenizer: A folder, a hub id, or a fast tokenizer; None takes the model's.
        device: A torch device or its name; a number is that GPU where there is one, and -1 the
            CPU; None takes the GPU where there is one, else the CPU.
        dtype: Type of the matrix products: torch.float32, torch.float16 or torch.bfloat16, or its
            name; "auto" is the type that the model is saved in. fp32 gives the scores of
            transformers 4. Half precision is faster on a GPU: the weights of the linear layers are
            then kept in it, while norms, sums and logits stay fp32. None: fp32, or, of a model of
            transformers, the type that it has.
        mixed_precision: The trainer's name for it: "no" is fp32, "fp16" float16, "bf16" bfloat16.
        arguments: Those of a call, which hold for all calls that do not give them; also
            torch_dtype, the name of dtype before transformers 4.56.

    Raises:
        UserError: For a model that does not load or has no question-answering head, and for an
            argument out of range.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        tokenizer: str | Path | PreTrainedTokenizerFast | None = None,
        *,
        device: str | int | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        mixed_precision: str | None = None,
        **arguments: Any,
    ):
        older = arguments.pop("torch_dtype", None)
        precision = asked_precision(older if dtype is None else dtype, mixed_precision)
        revision = arguments.pop("revision", None)
        if revision not in (None, "main"):
            raise UserError(
                f"revision is {revision!r}, and of a hub id the main one is read: "
                "download that one and name its folder."
            )
        self.settings = ReaderSettings().changed(arguments)
        self.device = device_of(device)
        loaded, self.name = _load(model, tokenizer)
        self.tokenizer = loaded.tokenizer
        self.notes = loaded.notes
        self._longest = longest_input(loaded, self.name)
        folder = self.name if isinstance(model, (str, Path)) else None
        self._dtype = change_type(loaded, folder, precision, self.device)
        self.model = place(loaded.model, self.device).eval()
        self._rooms: dict[int, Room] = {}  # by the longest window that is asked for
        self._warned_of_cuts = False

    def __call__(
        self,
        *inputs: Any,
        question: str | Sequence[str] | None = None,
        context: str | Sequence[str] | None = None,
        X: Any = None,
        data: Any = None,
        **arguments: Any,
    ) -> Answers | list[Answers] | Iterator[Answers]:
        """Answer questions, each in its context, as QuestionAnsweringPipeline of transformers 4.

        The search is exact, over all spans of every window. Scores, and how they are summed over
        equal texts, are described in kdfast.evaluation.pipeline_answers. Numbers may be of any
        type that holds a whole one. An argument that is None means what the Reader was made with,
        or else the default in brackets.

        Args:
            inputs: A dict {"question", "context"}, an object of the SquadExample kind
                (question_text, context_text), a tuple of two texts, an iterable or several of
                these, two texts, or a dict of two lists.
            question, context: Instead, two texts, two lists of one length, or a list of questions
                and the one context of all.
            X, data: Other names for inputs.
            top_k: (1) Answers to a question, fewer where its context has not as many. Also topk.
            handle_impossible_answer: (False) Let "", no answer, compete by its probability.
            max_answer_len: (15) Tokens in the longest answer considered.
            max_question_len: (64) Tokens of a question that are kept; a warning follows the first
                cut. (transformers 4 with a fast tokenizer never cut one, and failed if very long.)
            max_seq_len: (384, or fewer where the model reads fewer) Tokens in a window, special
                ones included.
            doc_stride: (128, or half of max_seq_len where that is less) Context tokens that two
                windows of one question share. This is the pipeline's meaning; in training and
                evaluation doc_stride is the step from window to window. A question that leaves no
                more than these for its context is refused, however short that is; by default its
                windows share half of what it leaves.
            align_to_words: (True) Widen answers to whole words, as the tokenizer splits words. As
                there, an answer's characters are those its tokens stand for, so that some
                tokenizers leave out a combining mark at its end.
            batch_size: (by tokens) The most windows that the model reads at once.
            num_workers, padding and the like: Without effect.

        Returns:
            The result of the only question, or a list with one result a question. Of a dict of
            lists it always is a list. Of a generator or a torch Dataset it is an iterator: of a
            generator, which may wait for its answers, it reads batch_size (1) questions ahead, and
            a text may be empty there. A result is {"score", "start", "end", "answer"}, where
            answer is context[start:end], or a list of these, best first, where there are several.

        Raises:
            UserError: For a question or a context that is empty or no text, for an argument out
                of range, and for logits that are NaN or infinite.
        """
        settings = self.settings.changed(arguments)
        named = [given for given in (X, data) if given is not None]
        inputs = inputs or tuple(named[:1])
        if len(inputs) == 1 and isinstance(inputs[0], (GeneratorType, Dataset)):
            given = inputs[0]
            items = cast(Iterable[Any], given)
            if not hasattr(given, "__iter__"):
                items = map(given.__getitem__, range(len(cast(Sized, given))))
            pairs = (pair_of(f"input {n}", i, may_be_empty=True) for n, i in enumerate(items))
            ahead = settings.batch_size or 1 if isinstance(given, GeneratorType) else None
            return self.stream(pairs, settings, read_ahead=ahead)
        asked, is_list = pairs_of(inputs, question, context)
        results = list(self.stream(asked, settings))
        return results if is_list or len(results) != 1 else results[0]

    def stream(
        self,
        pairs: Iterable[Pair],
        settings: ReaderSettings,
        progress: Callable[[float], object] | None = None,
        note: Callable[[str], object] = warnings.warn,
        read_ahead: int | None = None,
    ) -> Iterator[Answers]:
        """Yield one result a (question, context), in order, holding few of them in memory.

        Args:
            pairs: Of texts.
            settings: How they are answered.
            progress: Called with how many questions have been answered since the last call; the
                windows of a question are its fractions.
            note: Called with a sentence about questions that are cut.
            read_ahead: How many questions are read before the first of them is answered, at most.

        Raises:
            UserError: At once, for settings that the model cannot follow.
        """
        size = settings.max_seq_len or min(384, self.tokenizer.model_max_length, self._longest)
        if size > self._longest:
            raise UserError(
                f"max_seq_len is {size}, and {self.name} reads {self._longest} tokens at most: "
                "give a smaller one."
            )
        special = Template.learn(self.tokenizer).size
        if settings.doc_stride is not None and settings.doc_stride >= size - special:
            raise _too_much_shared(settings.doc_stride, size - special, size, "")
        chunks = chunks_of(pairs, CHUNK_CHARACTERS, read_ahead)
        return (
            result
            for chunk in chunks
            for result in self._answer(chunk, settings, size, progress, note)
        )

    def _answer(
        self,
        chunk: list[Pair],
        settings: ReaderSettings,
        size: int,
        progress: Callable[[float], object] | None,
        note: Callable[[str], object],
    ) -> list[Answers]:
        contexts = [context for _, context in chunk]
        number = {context: n for n, context in enumerate(dict.fromkeys(contexts))}
        windows = self._windows(chunk, settings, size, note)
        logits = np.empty((len(windows.input_ids), 2), dtype=np.float32)
        if size not in self._rooms:
            most = forward_tokens(self.model, windows, self.device, self._dtype)
            self._rooms[size] = Room(most)
        room = self._rooms[size]
        batches = cut_by_tokens(np.arange(len(windows)), windows.lengths, room.tokens)
        most = settings.batch_size or len(windows)
        batches = [b[n : n + most] for b in batches for n in range(0, len(b), most)]
        for indices, rows in forward_windows(
            self.model, windows, batches, self.device, self._dtype, room
        ):
            logits[flat_positions(windows, indices)] = rows
            if progress is not None:
                progress(len(chunk) * len(indices) / len(windows))
        return pipeline_answers(
            windows,
            logits,
            contexts,
            WordOffsets.encode(self.tokenizer, list(number)),
            np.array([number[context] for context in contexts]),
            settings,
        )

    def _windows(
        self,
        chunk: list[Pair],
        settings: ReaderSettings,
        size: int,
        note: Callable[[str], object],
    ) -> Windows:
        """The windows of a chunk, of `size` tokens at most."""
        shared = settings.doc_stride
        windows = windows_of(
            # An error about a question names its id.
            (Example(question[:80], "", question, context, None) for question, context in chunk),
            self.tokenizer,
            WindowSettings(size, settings.max_question_len),
            overlap=min(size // 2, 128) if shared is None else shared,
        )
        if shared is not None:
            left = size - (windows.lengths - windows.count)
            short = np.flatnonzero(left <= shared)
            if len(short):
                asked = chunk[windows.question[short[0]]][0]
                raise _too_much_shared(shared, int(left[short[0]]), size, asked)
        cut = windows.counts["truncated_questions"]
        if cut and not self._warned_of_cuts:
            self._warned_of_cuts = True
            note(
                f"max_question_len is {settings.max_question_len}, and a question of more tokens "
                "is cut to it, which may change its answer: give a larger one. (Said once.)"
            )
        return windows


def _too_much_shared(shared: int, left: int, size: int, question: str) -> UserError:
    taken = f"next to the question {question[:80]!r} " if question else ""
    return UserError(
        f"doc_stride is {shared}, and a window of {size} tokens {taken}has {max(0, left)} of its "
        "context, which it may not share all: give a smaller doc_stride or a larger max_seq_len."
    )


def _load(model: Any, tokenizer: Any) -> tuple[Loaded, str]:
    """The model with its tokenizer, and what errors call it."""
    if isinstance(tokenizer, (str, Path)):
        role, name = "tokenizer", str(tokenizer)
        tokenizer = load_tokenizer(local_folder(name, role), role)
    if isinstance(model, (str, Path)):
        return load_reader(str(model), "model", tokenizer=tokenizer), str(model)
    name = getattr(model, "name_or_path", "") or type(model).__name__
    if not isinstance(model, PreTrainedModel) or span_head_name(model) is None:
        raise UserError(
            f"model is {type(model).__name__}: give a folder, a hub id or a model for question "
            "answering."
        )
    check_type(model.config, name, "model")
    if tokenizer is None:
        raise UserError("tokenizer is missing: a model that is loaded already comes without one.")
    return Loaded(span_model_of(model, name, "model"), tokenizer, []), name
