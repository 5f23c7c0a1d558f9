"""Exact match, F1 and thresholds against values worked out by hand and a slow second writing."""

import random
import string
from fractions import Fraction
from types import SimpleNamespace

import pytest

from kdfast.common.errors import UserError
from kdfast.evaluation.metrics import (
    gold_answers,
    normalize_answer,
    question_scores,
    score,
    unmatched_ids,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  U.S.A., an Army!", "usa army"),
        ("\tA\n", ""),
        ("...", ""),
        ("a theatre", "theatre"),
        # Punctuation goes before articles: what is left is one word, or a new article.
        ("the-cat", "thecat"),
        ("t.h.e cat", "cat"),
        ("under_score $1,000", "underscore 1000"),
        # A letter with an accent is a letter: no word boundary inside "thé" or "à".
        ("thé à la carte", "thé à la carte"),
        # Chinese: full-width punctuation stays; a boundary next to it, none next to a character.
        ("《论语》,孔子", "《论语》孔子"),
        ("《论语》,the 孔子", "《论语》 孔子"),
        ("中国the", "中国the"),
        ("中国\u3000北京", "中国 北京"),
        # Arabic: its comma, its article and its vowel signs stay.
        ("الكتاب، (a) القلم", "الكتاب، القلم"),
        ("İ", "i\u0307"),
    ],
)
def test_normalisation(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("gold", "guess", "exact", "overlap"),
    [
        ("the Eiffel Tower", "Eiffel tower.", 1, Fraction(1)),
        # to twice and be once in common: precision 3/4, recall 3/6.
        ("to be or not to be", "to to to be", 0, Fraction(3, 5)),
        ("one two three", "four", 0, Fraction(0)),
        ("", "", 1, Fraction(1)),
        ("", "the", 1, Fraction(1)),
        ("word", "", 0, Fraction(0)),
        ("", "word", 0, Fraction(0)),
        # Chinese is not segmented: a text without spaces is one word.
        ("中国北京", "北京", 0, Fraction(0)),
        ("中国 北京", "北京", 0, Fraction(2, 3)),
        ("中国。", "中国", 0, Fraction(0)),
        ("中国.", "中国", 1, Fraction(1)),
        # Arabic: precision 2/2, recall 2/3; with the comma on one word, 1/2 and 1/3.
        ("محمد بن سلمان", "محمد سلمان", 0, Fraction(4, 5)),
        ("محمد بن سلمان", "محمد سلمان،", 0, Fraction(2, 5)),
        ("مُحَمَّد", "محمد", 0, Fraction(0)),
    ],
)
def test_pairs(gold, guess, exact, overlap):
    scores = question_scores({"q": (gold,)}, {"q": guess})
    assert scores.exact == [exact]
    assert scores.f1 == [pytest.approx(float(overlap), abs=1e-15)]


GOLD = {
    "right": ("the Nile", "Nile river"),
    "half": ("Marie Curie",),
    "null, guessed": (),
    "null, left out": (),
}
GUESSES = {
    "right": "Nile",
    "half": "Curie",
    "null, guessed": "anything",
    "null, left out": "",
}


def test_worked_out_without_odds():
    # F1 of "half": precision 1, recall 1/2, so 2/3.
    assert score(GOLD, GUESSES) == pytest.approx(
        {
            "exact": 50.0,
            "f1": 100 * (1 + 2 / 3 + 0 + 1) / 4,
            "total": 4,
            "HasAns_exact": 50.0,
            "HasAns_f1": 100 * (1 + 2 / 3) / 2,
            "HasAns_total": 2,
            "NoAns_exact": 50.0,
            "NoAns_f1": 50.0,
            "NoAns_total": 2,
        },
        rel=1e-15,
    )


def test_worked_out_with_odds():
    odds = {"null, left out": 3.0, "null, guessed": 1.0, "half": 0.5, "right": -2.0}
    found = score(GOLD, GUESSES, odds, null_threshold=0.5)
    # Odds equal to the threshold keep the answer; "null, guessed" is now answered with nothing.
    assert found["exact"] == 75.0
    assert found["NoAns_exact"] == 100.0
    assert found["HasAns_f1"] == pytest.approx(100 * (1 + 2 / 3) / 2, rel=1e-15)
    # From 2 right at no threshold: 3 after "right", in F1 3 2/3 after "half", then one less.
    assert (found["best_exact"], found["best_exact_thresh"]) == (75.0, -2.0)
    assert found["best_f1"] == pytest.approx(100 * (3 + 2 / 3) / 4, rel=1e-15)
    assert found["best_f1_thresh"] == 0.5
    assert list(found)[-4:] == ["best_exact", "best_exact_thresh", "best_f1", "best_f1_thresh"]


def test_threshold_without_odds_counts_them_as_zero():
    assert score(GOLD, GUESSES, None, -0.5)["exact"] == 50.0
    assert score(GOLD, GUESSES, None, -0.5)["NoAns_exact"] == 100.0
    assert score(GOLD, GUESSES, None, 0.0) == score(GOLD, GUESSES)


def test_best_threshold_is_first_of_equals_and_starts_at_zero():
    gold = {"a": ("x",), "b": (), "c": ("y",)}
    guesses = {"a": "x", "b": "z", "c": "y"}
    # 1 at the start, then 2, 1, 2: the first 2 wins.
    found = score(gold, guesses, {"a": -1.0, "b": 2.0, "c": 3.0})
    assert (found["best_exact"], found["best_exact_thresh"]) == (100 * 2 / 3, -1.0)
    # Nothing beats leaving every question out: 1 at the start, then 0, 0, 1.
    found = score(gold, {"a": "no", "b": "z", "c": "y"}, {"b": 2.0, "a": 5.0, "c": 7.0})
    assert (found["best_exact"], found["best_exact_thresh"]) == (100 * 1 / 3, 0.0)


def test_questions_of_equal_odds_enter_one_by_one_in_the_order_of_the_odds():
    gold = {"answerable": ("x",), "null": ()}
    guesses = {"null": "z", "answerable": "x"}
    found = score(gold, guesses, {"answerable": 4.0, "null": 4.0})
    assert (found["best_exact"], found["best_exact_thresh"]) == (100.0, 4.0)
    found = score(gold, guesses, {"null": 4.0, "answerable": 4.0})
    assert (found["best_exact"], found["best_exact_thresh"]) == (50.0, 0.0)


def test_all_gold_answers_count_and_empty_ones_are_dropped():
    assert score({"q": ("no", "...", "the yes")}, {"q": "Yes!"})["exact"] == 100.0
    # "the" is nothing after normalisation, and another answer is there: "" is wrong.
    assert score({"q": ("the", "cat")}, {"q": ""})["exact"] == 0.0
    # No other is there: "" is right, in a question that still counts as answerable...
    found = score({"q": ("the",)}, {"q": ""})
    assert (found["HasAns_exact"], found["HasAns_f1"]) == (100.0, 100.0)
    # ... so that it is wrong as soon as its odds say so.
    assert score({"q": ("the",)}, {"q": ""}, {"q": 2.0})["exact"] == 0.0


def test_keys_of_absent_kinds_are_absent():
    assert list(score({"q": ("x",)}, {"q": "x"})) == [
        *("exact", "f1", "total"),
        *("HasAns_exact", "HasAns_f1", "HasAns_total"),
    ]
    assert list(score({"q": ()}, {"q": "x"})) == [
        *("exact", "f1", "total"),
        *("NoAns_exact", "NoAns_f1", "NoAns_total"),
    ]


def test_missing_and_unknown_predictions():
    guesses = {"right": "Nile", "stranger": "x", "null, left out": ""}
    missing, unknown = unmatched_ids(GOLD, guesses)
    assert missing == ["half", "null, guessed"]
    assert unknown == ["stranger"]
    # A missing prediction is wrong, also at a threshold and where no answer would be right.
    odds = {"right": 0.0, "stranger": 9.0, "null, left out": 9.0, "null, guessed": 9.0}
    found = score(GOLD, guesses, odds, 1.0)
    assert (found["exact"], found["total"]) == (50.0, 4)
    assert (found["NoAns_exact"], found["NoAns_total"]) == (50.0, 2)
    assert found["best_exact"] == 50.0
    assert question_scores(GOLD, guesses).predicted == [True, False, False, True]


def test_scores_of_single_questions_keep_the_order_of_the_data():
    scores = question_scores(GOLD, GUESSES)
    assert scores.ids == list(GOLD)
    assert scores.exact == [1, 0, 0, 1]
    assert scores.f1 == pytest.approx([1, 2 / 3, 0, 1])
    assert scores.has_answer == [True, True, False, False]


@pytest.mark.parametrize(
    ("gold", "guesses", "odds", "words"),
    [
        ({}, {"q": "x"}, None, "no question"),
        ({"q": ()}, {"p": "x"}, None, "none of the data's question ids"),
        ({"q": ()}, {"q": None}, None, "'q' is None"),
        ({"q": ()}, {"q": ["x"]}, None, "'q' is \\['x'\\]"),
        ({"q": ()}, {"q": "x"}, {"p": 1.0}, "'q' has a prediction but no null odds"),
        ({"q": ()}, {"q": "x"}, {"q": float("nan")}, "'q' are nan"),
        ({"q": ()}, {"q": "x"}, {"q": "1.0"}, "'q' are '1.0'"),
    ],
)
def test_faulty_input_is_named(gold, guesses, odds, words):
    with pytest.raises(UserError, match=words):
        score(gold, guesses, odds)


def test_gold_answers_of_examples():
    answer = SimpleNamespace(text="x")
    examples = [
        SimpleNamespace(id="a", answers=(answer, answer)),
        SimpleNamespace(id="b", answers=()),
    ]
    assert gold_answers(examples) == {"a": ("x", "x"), "b": ()}
    with pytest.raises(UserError, match="'c' has no `answers`"):
        gold_answers([SimpleNamespace(id="c", answers=None)])


def _slow_words(text):
    """The words left after normalisation, a character at a time and without a pattern."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    runs, last = [], None
    for c in text:
        word = c.isalnum() or c == "_"
        if word != last:
            runs.append("")
        runs[-1] += c
        last = word
    return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()


def _slow_f1(gold, guess):
    rest, same = list(gold), 0
    for word in guess:
        if word in rest:
            rest.remove(word)
            same += 1
    if not gold or not guess:
        return Fraction(gold == guess)
    return Fraction(2 * same, len(gold) + len(guess))


def test_against_a_slow_second_writing():
    draw = random.Random(3)
    pieces = ["the", "A", "an", "cat", "Dog.", "-", "中国", "，", "كتاب", "،", "1,0", "\u00a0", "é"]

    def text():
        return draw.choice(["", " "]).join(draw.choices(pieces, k=draw.randint(0, 5)))

    for _ in range(300):
        gold, odds, guesses = {}, {}, {}
        for i in range(draw.randint(1, 8)):
            answers = draw.randint(0, 3)
            gold[str(i)] = tuple(text() for _ in range(answers))
            guesses[str(i)] = draw.choice([text(), *gold[str(i)]])
            odds[str(i)] = draw.choice([-1, 0.5, 2, draw.gauss(0, 1)])
        limit = draw.choice([-1, 0, 0.5])

        exact, overlap = [], []
        for key, answers in gold.items():
            golds = [words for words in map(_slow_words, answers) if words] or [[]]
            guess = _slow_words(guesses[key])
            exact.append(max(words == guess for words in golds))
            overlap.append(max(_slow_f1(words, guess) for words in golds))
        best = max(
            # The points of the search: the first m questions by odds are answered.
            sum(
                exact[int(key)] if gold[key] else guesses[key] == ""
                for key in sorted(odds, key=odds.get)[:m]
            )
            + sum(not gold[key] for key in sorted(odds, key=odds.get)[m:])
            for m in range(len(gold) + 1)
        )
        for i, key in enumerate(gold):
            if odds[key] > limit:
                exact[i] = overlap[i] = not gold[key]
        found = score(gold, guesses, odds, limit)
        assert found["exact"] == pytest.approx(100 * sum(exact) / len(gold), abs=1e-12)
        assert found["f1"] == pytest.approx(float(100 * sum(overlap) / len(gold)), abs=1e-12)
        assert found["best_exact"] == pytest.approx(100 * best / len(gold), abs=1e-12)
