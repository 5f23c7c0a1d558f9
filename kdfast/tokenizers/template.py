"""What a tokenizer puts around a question and a context, learned from one encoded pair."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kdfast.common.errors import UserError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


def is_of_backend(error: BaseException) -> bool:
    """Whether the Rust library `tokenizers` raised it.

    It raises bare Exception, and where it panics what is none: a pyo3_runtime.PanicException,
    a class that cannot be imported.
    """
    return type(error) is Exception or type(error).__name__ == "PanicException"


@contextmanager
def whole_texts(tokenizer: PreTrainedTokenizerFast) -> Iterator[Tokenizer]:
    """Its `tokenizers` object with truncation and padding off, and as it was afterwards.

    Raises UserError where that fails inside: files that load may still make it panic at a text.
    """
    backend = tokenizer.backend_tokenizer
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        yield backend
    except BaseException as error:
        if not is_of_backend(error):
            raise
        raise UserError(
            f"The tokenizer of {_name_of(tokenizer)} fails at a text ({first_line(error)}): "
            "use the files that the model was published with."
        ) from error
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def backend_text(tokenizer: PreTrainedTokenizerFast) -> str:
    """All that decides a fast tokenizer's output for one text, as JSON."""
    with whole_texts(tokenizer) as backend:
        return backend.to_str()


@dataclass(frozen=True)
class Template:
    """The special tokens that a tokenizer puts around a question and a context, as ids."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    uses_token_types: bool
    pad_token_id: int

    @property
    def size(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)

    @classmethod
    def learn(cls, tokenizer: PreTrainedTokenizerFast) -> Template:
        """Learns it from the encoding of a pair.

        Raises:
            UserError: for a tokenizer without a Rust backend, without a padding token, without a
                token in front (which stands for "no answer"), that puts ids there which are none
                of its own, or with token types of an unknown pattern.
        """
        name = _name_of(tokenizer)
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{name}: a slow tokenizer, which knows no character offsets: use its fast one "
                "(a folder with tokenizer.json)"
            )
        if tokenizer.pad_token_id is None:
            raise UserError(
                f"{name}: no padding token: state pad_token in its tokenizer_config.json"
            )
        with whole_texts(tokenizer) as backend:
            probe = backend.encode("probe", "probe")
            unknown = [n for n in probe.ids if backend.id_to_token(n) is None]
        if unknown:
            raise UserError(
                f"{name}: puts the id {unknown[0]} around a pair, which is none of its tokens: "
                "use the files that the model was published with"
            )
        side = probe.sequence_ids
        if 0 not in side or 1 not in side or side.index(0) > side.index(1):
            raise UserError(f"{name}: does not encode pairs as question, context: use another")
        question = side.index(0)
        between = question + side.count(0)
        context = side.index(1)
        after = context + side.count(1)
        if question == 0:
            raise UserError(
                f"{name}: puts no token in front of the question, where 'no answer' is predicted: "
                "use a tokenizer of the BERT, RoBERTa, XLM-R or DeBERTa kind"
            )
        uses_types = "token_type_ids" in tokenizer.model_input_names and any(probe.type_ids)
        if uses_types and probe.type_ids != [int(p >= context) for p in range(len(probe.ids))]:
            raise UserError(
                f"{name}: token types {probe.type_ids}, and known are those that are 0 up to the "
                "context and 1 from there on: state model_input_names without token_type_ids in "
                "its tokenizer_config.json if the model was trained without them"
            )
        ids = probe.ids
        return cls(
            tuple(ids[:question]),
            tuple(ids[between:context]),
            tuple(ids[after:]),
            uses_types,
            tokenizer.pad_token_id,
        )


def _name_of(tokenizer: PreTrainedTokenizerFast) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


def tokenizer_key(tokenizer: PreTrainedTokenizerFast) -> str:
    """The sha256, in hex, of all that decides a tokenizer's output.

    That is its backend with truncation and padding off, the special tokens it puts around a pair,
    and its padding token. Raises UserError as `Template.learn` does.
    """
    template = Template.learn(tokenizer)
    return hashlib.sha256(f"{backend_text(tokenizer)}\n{template}".encode()).hexdigest()


def same_tokens(tokenizer: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> bool:
    """Whether two tokenizers make the same tokens. Token types may differ."""
    kept, others = (Template.learn(each) for each in (tokenizer, other))
    return backend_text(tokenizer) == backend_text(other) and kept == replace(
        others, uses_token_types=kept.uses_token_types
    )
