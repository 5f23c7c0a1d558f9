"""From paragraphs to the lines of a candidate file: prompts, replies, the teacher's verdicts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kdfast.common.errors import UserError
from kdfast.synthetic.contexts import Paragraph
from kdfast.synthetic.generators import Generator, Reply
from kdfast.synthetic.judge import Judge
from kdfast.synthetic.prompts import Candidate, candidates_of, prompts_of
from kdfast.synthetic.selection import question_id

Line = dict[str, Any]


@dataclass(frozen=True)
class Asking:
    """How questions are asked for; see the flags of kdfast.questions."""

    template: str
    questions_per_context: int
    unanswerable: float
    batch_size: int


class Generation:
    """Generates questions for `paragraphs`, and lets the teacher answer them."""

    def __init__(
        self, paragraphs: list[Paragraph], generator: Generator, judge: Judge, asking: Asking
    ):
        self.paragraphs, self.generator, self.judge = paragraphs, generator, judge
        self.asking = asking
        self.articles: dict[str, list[int]] = defaultdict(list)
        for number, paragraph in enumerate(paragraphs):
            self.articles[paragraph.title].append(number)

    def lines(self, done: set[int]) -> Iterator[Line]:
        """Yield the lines of the paragraphs that are not `done`.

        Paragraphs whose replies depend on one another are generated in the same groups, however
        often a run is stopped.

        Raises:
            UserError: After the lines of a group, where one of its replies did not come.
        """
        size = self.asking.batch_size
        for first in range(0, len(self.paragraphs), size):
            group = range(first, min(first + size, len(self.paragraphs)))
            missing = [number for number in group if number not in done]
            if missing:
                yield from self._group(list(group) if self.generator.together else missing, missing)

    def _group(self, group: list[int], missing: list[int]) -> Iterator[Line]:
        asking = self.asking
        asked = [
            (number, *each)
            for number in group
            for each in prompts_of(
                self.paragraphs[number], asking.template, asking.questions_per_context
            )
        ]
        replies: dict[int, list[tuple[str, Reply]]] = {number: [] for number in missing}
        failed: UserError | None = None
        for begin in range(0, len(asked), asking.batch_size):
            part = asked[begin : begin + asking.batch_size]
            prompts = [prompt for _, prompt, _ in part]
            # The seed of a draw: no two batches of a run have the same.
            found = self.generator.replies(prompts, group[0] << 12 | begin // asking.batch_size)
            for (number, _, answer), reply in zip(part, found, strict=True):
                if isinstance(reply, UserError):
                    failed = reply
                    replies.pop(number, None)
                elif number in replies:
                    replies[number].append((answer, reply))
            if failed:  # nor have the prompts after this batch a reply
                for number, *_ in asked[begin + asking.batch_size :]:
                    replies.pop(number, None)
                break
        for number, own in replies.items():
            yield self._line(number, own)
        if failed:
            raise failed

    def _line(self, number: int, replies: list[tuple[str, Reply]]) -> Line:
        context = self.paragraphs[number].context
        dropped: Counter[str] = Counter()
        found = self._candidates(self.paragraphs[number], replies, dropped)
        others = [self._other(number, each.question) for each in found]
        asked = [(each.question, context) for each in found]
        asked += [
            (each.question, self.paragraphs[other].context)
            for each, other in zip(found, others, strict=True)
            if other is not None
        ]
        verdicts = (verdict._asdict() for verdict in self.judge.verdicts(asked))
        lines = [each._asdict() | {"verdict": next(verdicts)} for each in found]
        for line, other in zip(lines, others, strict=True):
            pair = None if other is None else {"paragraph": other, "verdict": next(verdicts)}
            line["pair"] = pair
        by = next((reply.by for _, reply in replies if reply.by), "")
        return {"paragraph": number, "by": by, "dropped": dict(dropped), "candidates": lines}

    def _candidates(
        self, paragraph: Paragraph, replies: list[tuple[str, Reply]], dropped: Counter[str]
    ) -> list[Candidate]:
        """The questions of the replies that the teacher is to answer."""
        if not replies:
            dropped["noted: a context has no answer that stands in it once, to ask for"] += 1
        most = self.asking.questions_per_context
        seen = {question.casefold() for question in paragraph.questions}
        kept = []
        for answer, reply in replies:
            if reply.fault:
                dropped[f"a reply {reply.fault}"] += 1
            if reply.fault and (answer or not reply.text):  # half a question is none
                continue
            found = candidates_of(reply.text, answer, dropped)
            dropped["more than --questions_per_context in a reply"] += len(found[most:])
            for candidate in found[:most]:
                if candidate.question.casefold() in seen:
                    dropped["the question is asked of this context already"] += 1
                elif self.judge.is_too_long(candidate.question):
                    dropped["the question has more tokens than the teacher's windows keep"] += 1
                else:
                    kept.append(candidate)
                seen.add(candidate.question.casefold())
        return kept

    def _other(self, number: int, question: str) -> int | None:
        """Another paragraph with the same title, drawn by the question's id; None for no pair."""
        paragraph = self.paragraphs[number]
        article = self.articles[paragraph.title] if paragraph.title else []
        drawn = int(question_id(paragraph.context, question), 16)
        if len(article) < 2 or drawn % 2**32 >= self.asking.unanswerable * 2**32:
            return None
        others = [other for other in article if other != number]
        return others[(drawn >> 32) % len(others)]
