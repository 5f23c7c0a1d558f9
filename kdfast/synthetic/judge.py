"""What a teacher finds in a context, and how sure it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from kdfast.common.run import Run
from kdfast.data.batches import cut_by_tokens
from kdfast.data.examples import Example
from kdfast.data.prepare import windows_of
from kdfast.data.windows import Windows
from kdfast.evaluation.answers import Spans, best_spans
from kdfast.evaluation.evaluated_model import AnswerSettings, EvaluatedModel
from kdfast.models.inference import forward_tokens, forward_windows
from kdfast.models.window_loader import flat_positions


class Verdict(NamedTuple):
    """A teacher's best span, and by how much it leads.

    Attributes:
        answer: Its text; "" where a context has no token.
        start: Where it begins in the context.
        over_null: Its score, start + end logit, less the null score.
        over_second: Its score less that of the best span that does not overlap it.
    """

    answer: str
    start: int
    over_null: float
    over_second: float


class Judge:
    """A reader that answers generated questions, with the windows that it was trained with.

    Raises UserError for a model that does not load.
    """

    def __init__(self, name: str, settings: AnswerSettings, run: Run):
        self.model = EvaluatedModel(name, "--teacher", settings, run)

    def is_too_long(self, question: str) -> bool:
        """Whether the question has more tokens than the windows keep."""
        ids = self.model.tokenizer(question, add_special_tokens=False)["input_ids"]
        return len(ids) > self.model.windows.max_query_length

    def verdicts(self, asked: Iterable[tuple[str, str]]) -> list[Verdict]:
        """The verdicts on (question, context) pairs, whose windows share forward passes.

        Raises UserError for logits that are NaN or infinite.
        """
        examples = [Example(str(n), "", *each, None) for n, each in enumerate(asked)]
        if not examples:
            return []
        model = self.model
        windows = windows_of(examples, model.tokenizer, model.windows)
        device, dtype = model.run.device, model.run.dtype
        logits = np.zeros((len(windows.input_ids), 2), dtype=np.float32)
        most = forward_tokens(model.model, windows, device, dtype)
        batches = cut_by_tokens(np.arange(len(windows)), windows.lengths, most)
        for indices, rows in forward_windows(model.model, windows, batches, device, dtype):
            logits[flat_positions(windows, indices)] = rows
        spans = best_spans(
            windows,
            logits,
            max_answer_length=model.settings.max_answer_length,
            n_best_size=model.settings.n_best_size,
        )
        return [_verdict(windows, spans, n, each.context) for n, each in enumerate(examples)]


def _verdict(windows: Windows, spans: Spans, question: int, context: str) -> Verdict:
    count = int((spans.window[question] >= 0).sum())
    if count == 0:
        return Verdict("", 0, -1e4, 0.0)
    where = (each[question, :count] for each in (spans.window, spans.start, spans.end))
    first, past = windows.char_span(*where)
    scores = spans.start_logit[question, :count].astype(float) + spans.end_logit[question, :count]
    apart = np.flatnonzero((past <= first[0]) | (first >= past[0]))
    # Where all that were kept overlap the best one, the last of them bounds the second.
    second = scores[apart[0]] if len(apart) else scores[-1]
    return Verdict(
        context[first[0] : past[0]],
        int(first[0]),
        # Four digits: what is left does not depend on how windows share forward passes.
        round(float(scores[0] - spans.null_score[question]), 4),
        round(float(scores[0] - second), 4),
    )
