"""Copies of paragraphs in which words are replaced, and what becomes of their answers."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdfast.common.errors import UserError
from kdfast.data.examples import Example, Place, locate
from kdfast.data.held_out import article_of
from kdfast.data.read import fingerprint, iter_examples
from kdfast.data.tally import Tally
from kdfast.models.hub import local_folder
from kdfast.synthetic.proposals import FirstOf, MaskedModel, Neighbours, Proposer
from kdfast.synthetic.settings import AugmentConfig
from kdfast.synthetic.words import Edited, Proposed, replace_words, words_of
from kdfast.teachers.cache import weights_key

FORMAT = 1  # raise it when the same settings give other copies
TOGETHER = 64  # paragraphs, whose forward passes share micro-batches


class Paragraph(NamedTuple):
    """A context and its questions. number: counts from 0."""

    number: int
    context: str
    examples: list[Example]


def key_of(config: AugmentConfig) -> str:
    """A key of all that the copies depend on but the versions of libraries."""
    made_of: dict[str, Any] = asdict(config) | {"output": None, "format": FORMAT}
    if Path(config.data).expanduser().is_fifo():
        raise UserError(f"--data {config.data} is a pipe, and is read twice: name a file.")
    made_of["data"] = fingerprint(config.data)
    made_of["vectors"] = config.vectors and fingerprint(config.vectors)
    for name in ("masked_model", "embeddings"):
        if given := made_of[name]:
            made_of[name] = weights_key(local_folder(given, f"--{name}"))
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def grouped(source: str, tally: Tally) -> Iterator[list[Paragraph]]:
    """The paragraphs of a source, TOGETHER at a time."""
    contexts = groupby(iter_examples(source, tally=tally), key=lambda example: example.context)
    paragraphs = (
        Paragraph(number, context, list(examples))
        for number, (context, examples) in enumerate(contexts)
    )
    while part := list(islice(paragraphs, TOGETHER)):
        yield part


def places_of(example: Example, context: str) -> list[Place]:
    """Where the answers of a question stand; those that stand nowhere are left out."""
    found = (locate(context, answer) for answer in example.answers or ())
    return [place for place in found if isinstance(place, Place)]


class Copier:
    """Makes the copies, and counts what it makes."""

    def __init__(self, config: AugmentConfig):
        self.config = config
        self.counts: Counter[str] = Counter()
        count = config.proposals
        proposers: list[Proposer] = []
        if config.masked_model:
            proposers.append(MaskedModel(config.masked_model, count))
        if config.vectors:
            proposers.append(Neighbours.of_file(Path(config.vectors).expanduser(), count))
        if config.embeddings:
            proposers.append(Neighbours.of_embeddings(config.embeddings, count))
        self.proposer = FirstOf(proposers)

    def copies(self, paragraphs: list[Paragraph]) -> Iterator[dict[str, Any]]:
        """The lines of the file: a context and its questions each, in SQuAD's form."""
        texts = [each.context for each in paragraphs]
        if self.config.augment_questions:
            texts += [each.question for one in paragraphs for each in one.examples]
        words = [words_of(text) for text in texts]
        proposals = self.proposer.propose(texts, words)
        known = list(map(Proposed, texts, words, proposals))
        questions = iter(known[len(paragraphs) :])
        for paragraph, context in zip(paragraphs, known, strict=False):
            own = list(islice(questions, len(paragraph.examples)))
            self.counts["paragraphs"] += 1
            places = [places_of(each, paragraph.context) for each in paragraph.examples]
            for copy in range(self.config.copies):
                yield self._copy(paragraph, copy, context, own, places)

    def _copy(
        self,
        paragraph: Paragraph,
        copy: int,
        context: Proposed,
        questions: list[Proposed],
        places: list[list[Place]],
    ) -> dict[str, Any]:
        draw = np.random.default_rng([self.config.seed, paragraph.number, copy])
        p = self.config.probability
        new = replace_words(context, p, draw)
        asked = [replace_words(each, p, draw).text for each in questions]
        counts = self.counts
        counts["copies"] += 1
        counts["words"] += len(context.words)
        counts["replaced"] += len(new.edits)
        counts["unknown"] += sum(not each for each in context.proposals)
        qas = []
        for number, example in enumerate(paragraph.examples):
            record = {"id": f"{example.id}-copy-{copy}", "question": example.question}
            if asked:
                record["question"] = asked[number]
            if self.config.answers == "keep" and example.answers is not None:
                record |= self._answers(example, places[number], new)
            qas.append(record)
        counts["questions"] += len(qas)
        # Of data without titles too, --validation_split knows whose copy it is.
        title = article_of(paragraph.examples[0])
        return {"title": title, "context": new.text, "qas": qas}

    def _answers(self, example: Example, places: list[Place], new: Edited) -> dict[str, Any]:
        """The keys of the answers that have a place in the copy; none where all are lost."""
        if not example.answers:
            return {"answers": [], "is_impossible": True}
        found = []
        for place in places:
            start = new.place(place.start, place.end)
            if start is not None:
                text = new.text[start : start + place.end - place.start]
                found.append({"text": text, "answer_start": start})
        if not found:
            self.counts["lost"] += 1
            return {}
        return {"answers": found, "is_impossible": False}

    def told(self) -> str:
        """What was made, in sentences."""
        of = self.counts
        words = max(1, of["words"])
        return (
            f"{of['copies']} copies of {of['paragraphs']} contexts were made. Of their words "
            f"{of['replaced'] / words:.1%} were replaced; {of['unknown'] / words:.1%} have no "
            f"proposals. Of {of['questions']} questions {of['lost']} lost their answers and are "
            "unlabelled."
        )
