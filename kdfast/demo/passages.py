"""Passages and questions, written from the templates.

A passage tells of two or three subjects of one domain (villages, ships, novels, …) and states a few
relations of each. Relations of one kind of answer stand side by side, and the subjects share some
relations, so that neither the kind of answer nor the relation alone leads to the right span. A
question names a subject and asks for a relation in words other than the passage's. It has no
answer where the passage states the relation of another subject only, or not the subject at all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from kdfast.demo.names import YEARS, Names
from kdfast.demo.templates import Domain, Relation, domains

QUESTIONS_PER_PASSAGE = 5
UNANSWERABLE = 0.33  # share of the questions

# What a passage tells. "full" is the corpus; the others are the first lessons of the teacher:
# "pair" tells one relation of two subjects, so that only the subject's name decides, and has no
# unanswerable question; "short" tells one relation, often another, of each of two subjects.
Lesson = Literal["pair", "short", "full"]


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    answer: str  # "" where the passage has none
    start: int  # character offset in the passage; -1 without an answer
    sentence: str  # that holds the answer; "" without one


@dataclass(frozen=True, slots=True)
class Passage:
    title: str
    text: str
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class _Fact:
    subject: int
    relation: Relation
    answer: str


Subjects = list[tuple[str, str]]  # name within a sentence, pronoun
Places = dict[int, tuple[int, str]]  # of a fact, by its index: start of the answer, sentence


def passages(
    side: str, count: int, seed: int, lesson: Lesson = "full"
) -> tuple[list[Passage], set[str]]:
    """`count` questions' worth of passages of one side, and the invented names in them.

    side: "train" or "validation"; the sides share no invented name, with any seeds.
    """
    rng = random.Random(f"{side} {seed}")
    names = Names(side, rng)
    found: list[Passage] = []
    seen: set[str] = set()
    questions = 0
    while questions < count:
        most = min(QUESTIONS_PER_PASSAGE, count - questions)
        passage = _passage(rng.choice(domains()), names, rng, most, lesson)
        if passage.text in seen:
            continue
        seen.add(passage.text)
        found.append(passage)
        questions += len(passage.questions)
    return found, names.drawn


def _passage(
    domain: Domain, names: Names, rng: random.Random, count: int, lesson: Lesson
) -> Passage:
    number = rng.choice((2, 2, 3)) if lesson == "full" else 2
    subjects = _distinct(lambda: names.subject(domain.subject), number, set())
    each = 6 // number if lesson == "full" else 1
    facts = _facts(domain, subjects, each, lesson == "pair", names, rng)
    text, places = _tell(domain, subjects, facts, names, rng)
    unanswerable = 0.0 if lesson == "pair" else UNANSWERABLE
    questions = _questions(domain, subjects, facts, text, places, unanswerable, names, rng)
    return Passage(subjects[0][0], text, questions[:count])


def _distinct(draw: Callable, count: int, taken: set) -> list:
    """`count` different draws, none of them in `taken`, to which they are added."""
    found: list = []
    while len(found) < count:
        item = draw()
        if item not in taken:
            taken.add(item)
            found.append(item)
    return found


def _facts(
    domain: Domain, subjects: Subjects, each: int, same: bool, names: Names, rng: random.Random
) -> list[_Fact]:
    """`each` relations of every subject: the `same` ones, or drawn so that some are shared."""
    common = rng.sample(domain.relations, each if same else each + 1)
    taken = {name for name, _ in subjects}
    years = rng.sample(YEARS, 3 * len(subjects))
    facts = []
    for i in range(len(subjects)):
        ranked = sorted(years[3 * i : 3 * i + 3])
        pool = common if same or rng.random() < 0.7 else domain.relations
        for relation in rng.sample(pool, each):
            if relation.kind.startswith("year"):  # year1 < year2 < year3 in the life of a subject
                answer = str(ranked[int(relation.kind[4:]) - 1])
            else:
                [answer] = _distinct(partial(names.value, relation.kind), 1, taken)
            facts.append(_Fact(i, relation, answer))
    return facts


def _tell(
    domain: Domain, subjects: Subjects, facts: list[_Fact], names: Names, rng: random.Random
) -> tuple[str, Places]:
    """The passage's text and, for each fact, its (start of the answer, sentence)."""
    order = list(range(len(facts)))
    mixed = rng.random() < 0.25
    if mixed:
        rng.shuffle(order)
    fillers = {kind: names.value(kind) for kind in ("river", "town")}
    intro = rng.choice(domain.intro).format(S=subjects[0][0], **fillers)
    sentences = [_capital(intro)]
    aside = rng.random() < 0.4
    places: Places = {}
    told = 0 if not mixed else None  # the subject that a pronoun would stand for
    for at, index in enumerate(order):
        fact = facts[index]
        if aside and at and (mixed or fact.subject != facts[order[at - 1]].subject):
            sentences.append(rng.choice(domain.aside))
            aside = False
        template = rng.choice(fact.relation.say)
        name, pronoun = subjects[fact.subject]
        if fact.subject == told and rng.random() < 0.55:
            template = _refer(template, pronoun if rng.random() < 0.5 else f"the {domain.noun}")
        told = fact.subject if not mixed else None
        before, after = template.replace("{S}", name).split("{A}")
        sentence = _capital(before + fact.answer + after)
        places[index] = (sum(map(len, sentences)) + len(sentences) + len(before), sentence)
        sentences.append(sentence)
    return " ".join(sentences), places


def _refer(template: str, reference: str) -> str:
    """The template with its subject named by a pronoun, where it comes first, or by its noun."""
    if reference.startswith("the ") or template.startswith("{S} "):
        return template.replace("{S}", reference)
    return template


def _questions(
    domain: Domain,
    subjects: Subjects,
    facts: list[_Fact],
    text: str,
    places: Places,
    unanswerable: float,
    names: Names,
    rng: random.Random,
) -> tuple[Question, ...]:
    """A question for each of some facts, or in its place one without an answer."""
    told = {(fact.subject, fact.relation.name) for fact in facts}
    answerable = rng.sample(range(len(facts)), min(len(facts), QUESTIONS_PER_PASSAGE))
    found = []
    for index in answerable:
        if rng.random() < unanswerable:
            subject, relation = _unanswerable(domain, subjects, facts, told, names, rng)
            found.append(Question(_ask(relation, subject, names, rng), "", -1, ""))
        else:
            fact = facts[index]
            start, sentence = places[index]
            question = _ask(fact.relation, subjects[fact.subject][0], names, rng)
            answer = text[start : start + len(fact.answer)]  # capitalised where it comes first
            found.append(Question(question, answer, start, sentence))
    return tuple(found)


def _unanswerable(
    domain: Domain,
    subjects: Subjects,
    facts: list[_Fact],
    told: set[tuple[int, str]],
    names: Names,
    rng: random.Random,
) -> tuple[str, Relation]:
    """A subject and a relation of which the passage says nothing, near to what it does say."""
    if rng.random() < 0.35:
        taken = set(subjects)
        [(absent, _)] = _distinct(lambda: names.subject(domain.subject), 1, taken)
        return absent, rng.choice(facts).relation
    subject = rng.randrange(len(subjects))
    missing = [r for r in domain.relations if (subject, r.name) not in told]
    kinds = {fact.relation.kind.rstrip("123") for fact in facts if fact.subject == subject}
    elsewhere = [r for r in missing if any(fact.relation is r for fact in facts)]
    alike = [r for r in missing if r.kind.rstrip("123") in kinds]
    pools = [pool for pool in (elsewhere, alike, missing) if pool]
    return subjects[subject][0], rng.choice(rng.choice(pools))


def _ask(relation: Relation, name: str, names: Names, rng: random.Random) -> str:
    wordings = relation.ask + (relation.held_out if names.side == "validation" else ())
    return rng.choice(wordings).replace("{S}", name)


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
