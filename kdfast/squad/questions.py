"""The forms in which questions and their contexts are given to a reader."""

from __future__ import annotations

from kdfast.errors import UserError

Pair = tuple[str, str]


def check_text(role: str, text: object) -> str:
    """`text`, if it is a text that a tokenizer takes. Raises UserError, naming `role`, if not."""
    if not isinstance(text, str):
        raise UserError(f"{role} is {type(text).__name__}: give a text.")
    if not text:
        raise UserError(f"{role} is empty: give a text.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{role} holds half a surrogate pair at character {error.start}: write the character "
            "whole."
        ) from None
    return text


def pairs_of(inputs: tuple, question: object, context: object) -> list[Pair]:
    """The (question, context) pairs of a call, in the forms that Reader.__call__ describes.

    inputs: the arguments without a name. Raises UserError for any other form, and for a text that
    is none or empty.
    """
    if inputs and (question is not None or context is not None):
        raise UserError("Give the questions either as they are or as question= and context=.")
    if inputs:
        return _of_arguments(inputs)
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


def _of_arguments(inputs: tuple) -> list[Pair]:
    if len(inputs) == 2 and all(isinstance(text, str) for text in inputs):
        return [(check_text("question", inputs[0]), check_text("context", inputs[1]))]
    items = inputs
    if len(inputs) == 1 and not isinstance(inputs[0], (dict, str)):
        try:
            items = list(inputs[0])
        except TypeError:
            items = inputs
    pairs = []
    for n, item in enumerate(items):
        if not isinstance(item, dict) or not {"question", "context"} <= item.keys():
            raise UserError(f'input {n} is no dict with "question" and "context": give one.')
        pairs.append(
            (
                check_text(f"question of input {n}", item["question"]),
                check_text(f"context of input {n}", item["context"]),
            )
        )
    return pairs
