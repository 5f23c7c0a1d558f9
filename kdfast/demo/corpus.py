"""A reading-comprehension corpus in the shape of SQuAD 2.0, written from templates.

A passage tells of two or three subjects of one domain (villages, ships, novels, …) and states a few
relations of each. Relations of one kind of answer stand side by side, and the subjects share some
relations, so that neither the kind of answer nor the relation alone leads to the right span. A
question names a subject and asks for a relation in words other than the passage's. It has no
answer where the relation is told of another subject only, or where its subject is not told of.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import yaml

from kdfast.demo.names import YEARS, Names

DOMAINS = Path(__file__).parent / "domains"
QUESTIONS_PER_PASSAGE = 5
UNANSWERABLE = 0.33  # share of the questions


@dataclass(frozen=True, slots=True)
class Relation:
    name: str
    kind: str  # of the answer
    say: tuple[str, ...]  # statements, with {S} for the subject and {A} for the answer
    ask: tuple[str, ...]  # questions
    held_out: tuple[str, ...]  # a wording of the question that the training side never sees


@dataclass(frozen=True, slots=True)
class Domain:
    name: str
    subject: str
    noun: str
    intro: tuple[str, ...]
    aside: tuple[str, ...]
    relations: tuple[Relation, ...]


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


@cache
def domains() -> tuple[Domain, ...]:
    """All domains, by file name."""
    return tuple(_read_domain(path) for path in sorted(DOMAINS.glob("*.yaml")))


def _read_domain(path: Path) -> Domain:
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    relations = tuple(
        Relation(
            name,
            entry["answer"],
            tuple(entry["say"]),
            tuple(entry["ask"]),
            (entry["held_out"],) if "held_out" in entry else (),
        )
        for name, entry in data["relations"].items()
    )
    return Domain(
        path.stem,
        data["subject"],
        data["noun"],
        tuple(data["intro"]),
        tuple(data["aside"]),
        relations,
    )


def passages(
    side: str, count: int, seed: int, *, short: bool = False
) -> tuple[list[Passage], set[str]]:
    """`count` questions' worth of passages of one side, and the invented names in them.

    side: "train" or "validation"; the sides share no invented name, whatever the seeds.
    short: two subjects with one relation each, for the first lessons of a teacher.
    """
    rng = random.Random(f"{side} {seed}")
    names = Names(side, rng)
    found: list[Passage] = []
    seen: set[str] = set()
    questions = 0
    while questions < count:
        most = min(QUESTIONS_PER_PASSAGE, count - questions)
        passage = _passage(rng.choice(domains()), names, rng, most, short)
        if passage.text in seen:
            continue
        seen.add(passage.text)
        found.append(passage)
        questions += len(passage.questions)
    return found, names.drawn


def _passage(domain: Domain, names: Names, rng: random.Random, count: int, short: bool) -> Passage:
    number = 2 if short else rng.choice((2, 2, 3))
    subjects = _distinct(lambda: names.subject(domain.subject), number, set())
    each = 1 if short else 6 // number
    facts = _facts(domain, subjects, each, names, rng)
    text, places = _tell(domain, subjects, facts, names, rng)
    questions = _questions(domain, subjects, facts, text, places, names, rng)
    return Passage(subjects[0][0], text, questions[:count])


def _distinct(draw, count: int, taken: set) -> list:
    """`count` different draws, none of them in `taken`, to which they are added."""
    found: list = []
    while len(found) < count:
        item = draw()
        if item not in taken:
            taken.add(item)
            found.append(item)
    return found


def _facts(domain: Domain, subjects, each: int, names: Names, rng: random.Random) -> list[_Fact]:
    """`each` relations of every subject, drawn so that the subjects share some."""
    common = rng.sample(domain.relations, each + 1)
    taken = {name for name, _ in subjects}
    years = rng.sample(YEARS, 3 * len(subjects))
    facts = []
    for i in range(len(subjects)):
        ranked = sorted(years[3 * i : 3 * i + 3])
        pool = common if rng.random() < 0.7 else domain.relations
        for relation in rng.sample(pool, each):
            if relation.kind.startswith("year"):  # year1 < year2 < year3 in the life of a subject
                answer = str(ranked[int(relation.kind[4:]) - 1])
            else:
                [answer] = _distinct(partial(names.value, relation.kind), 1, taken)
            facts.append(_Fact(i, relation, answer))
    return facts


def _tell(domain: Domain, subjects, facts: list[_Fact], names: Names, rng: random.Random):
    """The passage's text and, for each fact, its (start of the answer, sentence)."""
    order = list(range(len(facts)))
    mixed = rng.random() < 0.25
    if mixed:
        rng.shuffle(order)
    fillers = {kind: names.value(kind) for kind in ("river", "town")}
    intro = rng.choice(domain.intro).format(S=subjects[0][0], **fillers)
    sentences = [_capital(intro)]
    aside = rng.random() < 0.4
    places: dict[int, tuple[int, str]] = {}
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


def _questions(domain: Domain, subjects, facts, text, places, names: Names, rng: random.Random):
    told = {(fact.subject, fact.relation.name) for fact in facts}
    answerable = rng.sample(range(len(facts)), min(len(facts), QUESTIONS_PER_PASSAGE))
    found = []
    for index in answerable:
        if rng.random() < UNANSWERABLE:
            subject, relation = _unanswerable(domain, subjects, facts, told, names, rng)
            found.append(Question(_ask(relation, subject, names, rng), "", -1, ""))
        else:
            fact = facts[index]
            start, sentence = places[index]
            question = _ask(fact.relation, subjects[fact.subject][0], names, rng)
            answer = text[start : start + len(fact.answer)]  # capitalised where it comes first
            found.append(Question(question, answer, start, sentence))
    return tuple(found)


def _unanswerable(domain: Domain, subjects, facts, told, names: Names, rng: random.Random):
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


def write_corpus(
    folder: Path,
    seed: int = 0,
    *,
    train_questions: int = 3000,
    validation_questions: int = 800,
    unlabelled: float = 0.0,
) -> tuple[Path, Path]:
    """Write train.json and validation.json into `folder`, made if missing; returns their paths.

    unlabelled: the share of training passages whose questions have no `answers` key. The bytes
    depend on the arguments alone. The validation never depends on `train_questions`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for side, count, share in (
        ("train", train_questions, unlabelled),
        ("validation", validation_questions, 0.0),
    ):
        found, _ = passages(side, count, seed)
        hidden = round(share * len(found))
        articles = [
            _article(passage, f"{side}-{seed}-{i}", labelled=i >= hidden)
            for i, passage in enumerate(found)
        ]
        path = folder / f"{side}.json"
        data = {"version": "v2.0", "data": articles}
        path.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        paths.append(path)
    return paths[0], paths[1]


def _article(passage: Passage, key: str, *, labelled: bool) -> dict:
    qas = []
    for i, question in enumerate(passage.questions):
        qa: dict = {"id": f"{key}-{i}", "question": question.text}
        if labelled:
            found = [{"text": question.answer, "answer_start": question.start}]
            qa["answers"] = found if question.answer else []
            qa["is_impossible"] = not question.answer
        qas.append(qa)
    return {"title": passage.title, "paragraphs": [{"context": passage.text, "qas": qas}]}
