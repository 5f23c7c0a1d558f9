"""The (question, context) pairs that a Reader is called with, in each of their forms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from kdfast.common.errors import UserError

Pair = tuple[str, str]


def check_text(role: str, text: object, *, may_be_empty: bool = False) -> str:
    """Returns `text` if a tokenizer takes it, else raises UserError, which calls it `role`."""
    if not isinstance(text, str):
        raise UserError(f"{role} is {type(text).__name__}: give a text.")
    if not text and not may_be_empty:
        raise UserError(f"{role} is empty: give a text.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{role} holds half a surrogate pair at character {error.start}: write the character "
            "whole."
        ) from None
    return text


def pairs_of(inputs: tuple, question: object, context: object) -> tuple[list[Pair], bool]:
    """The (question, context) pairs of a call, in the forms that Reader.__call__ describes.

    Args:
        inputs: the arguments without a name.
        question, context: those with a name, or None.

    Returns:
        The pairs, and whether their answers are a list even if there is only one.

    Raises:
        UserError: for any other form, and for a text that is none or empty.
    """
    if inputs and (question is not None or context is not None):
        raise UserError("Give the questions either as they are or as question= and context=.")
    if not inputs:
        return _of_texts(question, context), False
    if len(inputs) == 2 and all(isinstance(text, str) for text in inputs):
        return [pair_of("", inputs)], False
    items: Sequence = inputs
    if len(inputs) == 1:
        only = inputs[0]
        if isinstance(only, Mapping) and isinstance(only.get("question"), (list, tuple)):
            return _of_texts(only["question"], only.get("context")), True
        if not _is_one(only):
            try:
                items = list(only)
            except TypeError:
                items = inputs
    return [pair_of(f"input {n}", item) for n, item in enumerate(items)], False


def pair_of(role: str, item: object, *, may_be_empty: bool = False) -> Pair:
    """The question and the context of one input.

    Args:
        role: what an error calls the input.
        item: a mapping with both, an object of transformers' SquadExample kind, or a tuple of two
            texts.
        may_be_empty: whether their texts may be "".

    Raises:
        UserError: for any other input, and for a text that a tokenizer does not take.
    """
    question: object
    context: object
    if isinstance(item, Mapping) and {"question", "context"} <= item.keys():
        question, context = item["question"], item["context"]
    elif hasattr(item, "question_text") and hasattr(item, "context_text"):
        question, context = item.question_text, item.context_text
    elif isinstance(item, tuple) and len(item) == 2:
        question, context = item
    else:
        raise UserError(f'{role} is no dict with "question" and "context": give one.')
    of = f" of {role}" if role else ""
    return (
        check_text(f"question{of}", question, may_be_empty=may_be_empty),
        check_text(f"context{of}", context, may_be_empty=may_be_empty),
    )


def _is_one(item: object) -> bool:
    """Whether it is one input, and not several."""
    texts = isinstance(item, tuple) and all(isinstance(text, str) for text in item)
    return isinstance(item, (Mapping, str)) or hasattr(item, "question_text") or texts


def _of_texts(question: object, context: object) -> list[Pair]:
    """The pairs of question= and context=: two texts, two lists, or a list and a text."""
    if question is None or context is None:
        raise UserError(f"{'question' if question is None else 'context'} is missing: give it.")
    if isinstance(question, str):
        if not isinstance(context, str):
            raise UserError("question is one text and context is not: give one context.")
        return [(check_text("question", question), check_text("context", context))]
    if not isinstance(question, (list, tuple)) or not isinstance(context, (list, tuple, str)):
        kinds = f"{type(question).__name__} and {type(context).__name__}"
        raise UserError(f"question and context are {kinds}: give texts, or lists of them.")
    contexts = [context] * len(question) if isinstance(context, str) else context
    if len(question) != len(contexts):
        raise UserError(
            f"{len(question)} questions and {len(contexts)} contexts: give as many of each."
        )
    return [
        (check_text(f"question[{n}]", q), check_text(f"context[{n}]", c))
        for n, (q, c) in enumerate(zip(question, contexts, strict=True))
    ]


def chunks_of(pairs: Iterable[Pair], characters: int, most: int | None) -> Iterator[list[Pair]]:
    """Consecutive pairs of about so many characters together, at least one and at most `most`."""
    chunk: list[Pair] = []
    size = 0
    for pair in pairs:
        chunk.append(pair)
        size += len(pair[0]) + len(pair[1])
        if size >= characters or len(chunk) == most:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
