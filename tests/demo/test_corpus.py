"""The demo's corpus: what its questions promise about the passages."""

import hashlib
import json
import re
from collections import Counter
from itertools import pairwise

import pytest

from kdfast.data.read import read_examples
from kdfast.demo.corpus import write_corpus
from kdfast.demo.names import SIDES, side_of
from kdfast.demo.passages import passages
from kdfast.demo.templates import domains

# Words that say nothing about what is asked or told.
FUNCTION_WORDS = """
a an and are at be by can could did do does for from go had has have he her him his how in into is
it its made make many much no not of on one or out over she that the their them there they this to
up was were what when where which who whom whose with year
"""
FUNCTION_WORDS = frozenset(re.findall(r"\w+", FUNCTION_WORDS))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), 5, unlabelled=0.25)


@pytest.fixture(scope="module", params=SIDES)
def side(request):
    found, drawn = passages(request.param, 2000, seed=3)
    return request.param, found, drawn


def content_words(text):
    return [w for w in re.findall(r"[a-z0-9]+", text.lower()) if w not in FUNCTION_WORDS]


def test_the_files_are_squad_and_have_the_asked_size(corpus):
    train, validation = (read_examples(str(path)) for path in corpus)
    assert len(train) == 3000
    assert len(validation) == 800
    ids = [example.id for example in train + validation]
    assert len(set(ids)) == len(ids)
    assert all(example.answers is not None for example in validation)


def test_the_asked_share_of_the_training_questions_is_unlabelled(corpus):
    data = json.loads(corpus[0].read_text(encoding="utf-8"))["data"]
    labelled = ["answers" in qa for a in data for p in a["paragraphs"] for qa in p["qas"]]
    assert labelled.count(False) / len(labelled) == pytest.approx(0.25, abs=0.01)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path, corpus):
    def digests(folder, seed):
        paths = write_corpus(folder, seed, unlabelled=0.25)
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]

    first = [hashlib.sha256(path.read_bytes()).hexdigest() for path in corpus]
    assert digests(tmp_path / "again", 5) == first
    assert not set(digests(tmp_path / "other", 6)) & set(first)


def test_the_validation_does_not_depend_on_the_size_of_the_training_side(tmp_path):
    _, small = write_corpus(tmp_path / "small", 1, train_questions=50)
    _, large = write_corpus(tmp_path / "large", 1, train_questions=500)
    assert small.read_bytes() == large.read_bytes()


def test_every_answer_stands_at_its_offset_as_whole_words(side):
    _, found, _ = side
    for passage in found:
        for question in passage.questions:
            if question.answer:
                end = question.start + len(question.answer)
                assert passage.text[question.start : end] == question.answer
                around = passage.text[question.start - 1 : question.start] + passage.text[end]
                assert not any(character.isalnum() for character in around)


def test_a_third_of_the_questions_has_no_answer(side):
    _, found, _ = side
    unanswerable = [not question.answer for passage in found for question in passage.questions]
    assert 0.28 < sum(unanswerable) / len(unanswerable) < 0.38


def test_both_kinds_of_unanswerable_question_occur(side):
    """The subject is not told of, or it is and only the relation is missing."""
    _, found, _ = side
    absent = present = 0
    for passage in found:
        words = set(content_words(passage.text))
        for question in passage.questions:
            if not question.answer:
                names = re.findall(r"[A-Z][a-z]+", question.text[1:])
                if all(name.lower() in words for name in names):
                    present += 1
                else:
                    absent += 1
    assert absent > 100
    assert present > 300


def test_the_sides_share_no_name_and_no_passage():
    drawn, texts = {}, {}
    for name in SIDES:
        found, drawn[name] = passages(name, 3_000, seed=1)
        texts[name] = {passage.text for passage in found}
        assert len(texts[name]) == len(found)
        assert {side_of(each) for each in drawn[name]} == {name}
        # Most of the drawn names stand in the text: rivers and rejected draws need not.
        joined = " ".join(texts[name]).lower()
        assert sum(each in joined for each in drawn[name]) > 0.8 * len(drawn[name])
    assert not drawn["train"] & drawn["validation"]
    assert not texts["train"] & texts["validation"]
    assert min(map(len, drawn.values())) > 300


def test_validation_names_do_not_occur_in_training_passages():
    _, validation_names = passages("validation", 2000, seed=1)
    found, _ = passages("train", 2000, seed=1)
    words = Counter(w for p in found for w in re.findall(r"[a-z]+", p.text.lower()))
    pairs = {f"{a} {b}" for p in found for a, b in pairwise(re.findall(r"\w+", p.text.lower()))}
    # Parts of names may be words of their own ("Winter" the surname, winter the season).
    shared = {name for name in validation_names if name in words or name in pairs}
    assert len(shared) <= 2, shared


def test_there_are_hundreds_of_templates_and_none_twice_in_a_domain():
    say = [text for domain in domains() for relation in domain.relations for text in relation.say]
    ask = [
        text
        for domain in domains()
        for relation in domain.relations
        for text in relation.ask + relation.held_out
    ]
    assert len(domains()) >= 16
    assert len(say) >= 390
    assert len(ask) >= 430
    for domain in domains():
        asked = [t for r in domain.relations for t in r.ask + r.held_out]
        assert len(set(asked)) == len(asked), domain.name
        assert all(text.count("{S}") == 1 and text.endswith("?") for text in asked)
        for relation in domain.relations:
            assert all(t.count("{S}") == 1 and t.count("{A}") == 1 for t in relation.say)


def test_some_wordings_are_kept_for_the_validation():
    held_out = [
        text.replace("{S}", "").split()
        for domain in domains()
        for relation in domain.relations
        for text in relation.held_out
    ]
    assert len(held_out) >= 45

    def asks(side):
        found, _ = passages(side, 4000, seed=2)
        questions = [q.text.split() for p in found for q in p.questions]
        return sum(
            any(q[: len(w) - 1] == w[:-1] for q in questions) for w in held_out if w[-1] == "?"
        )

    assert asks("validation") > 20
    assert asks("train") <= 2  # a wording may begin like another domain's


def test_questions_are_worded_unlike_the_sentence_that_answers_them(side):
    """Apart from the subject's name, few content words of a question stand in the sentence."""
    _, found, _ = side
    shares = []
    for domain in domains():
        for relation in domain.relations:
            for ask in relation.ask + relation.held_out:
                words = content_words(ask.replace("{S}", ""))
                for say in relation.say:
                    told = set(content_words(re.sub(r"\{\w\}", "", say)))
                    shares.append(sum(w in told for w in words) / max(1, len(words)))
    assert sum(shares) / len(shares) < 0.12
    assert found


def test_relation_and_subject_must_both_be_read(side):
    """Most answerable questions have a rival of the same kind, or the relation told of another."""
    _, found, _ = side
    rivals = []
    for passage in found:
        years = re.findall(r"\b(?:1[789]|20)\d\d\b", passage.text)
        for question in passage.questions:
            if re.fullmatch(r"(?:1[789]|20)\d\d", question.answer):
                rivals.append(len(years) > 1)
    assert sum(rivals) / len(rivals) > 0.6


def test_the_tokenizer_knows_every_word_and_splits_names_into_parts():
    pytest.importorskip("transformers")
    from tests.demo.vocabulary import make_tokenizer

    tokenizer = make_tokenizer(160)
    found, drawn = passages("validation", 1000, seed=9)
    pieces = Counter()
    for passage in found:
        pieces.update(tokenizer.tokenize(passage.text))
        for question in passage.questions:
            pieces.update(tokenizer.tokenize(question.text))
    assert "[UNK]" not in pieces
    letters = [p for p in pieces if re.fullmatch(r"##[a-z]", p)]
    assert sum(pieces[p] for p in letters) < 0.01 * sum(pieces.values())
    joined = [name for name in drawn if " " not in name]
    whole = [name for name in joined if not 1 < len(tokenizer.tokenize(name)) <= 4]
    assert len(whole) < 0.05 * len(joined), whole  # some are words too: Winter, Hartman
