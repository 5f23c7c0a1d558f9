"""Each benchmark's rule against figures that its official script gave (tests/golden)."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from kdfast.common.errors import UserError
from kdfast.evaluation import metric_rules, metrics
from tests.golden.make_metric_figures import TARGET

CASES = json.loads(Path(TARGET).read_text(encoding="utf-8"))["cases"]
NAMES = ("mlqa", "cmrc", "korquad")


def test_there_are_cases_of_every_rule():
    count = Counter((each["metric"], each["language"]) for each in CASES)
    languages = {("mlqa", language) for language in metric_rules.MLQA_ARTICLES}
    assert set(count) == {("cmrc", None), ("korquad", None), *languages}
    assert min(count.values()) >= 5


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['metric']}-{case['answer']}")
def test_the_official_figures(case):
    rule = metric_rules.find(case["metric"], case["language"])
    found = metrics.score(
        {"q": tuple(case["golds"])}, {"q": case["answer"]}, None, 1.0, rule.best_scores
    )
    assert (found["exact"], found["f1"]) == (case["exact"], case["f1"])


@pytest.mark.parametrize("name", NAMES)
def test_questions_without_an_answer(name):
    rule = metric_rules.find(name, "de" if name == "mlqa" else None)
    gold = {"right": (), "marks": (), "wrong": ()}
    predictions = {"right": "", "marks": "()" if name == "korquad" else "-", "wrong": "Köln"}
    scores = metrics.question_scores(gold, predictions, rule.best_scores)
    assert scores.exact == scores.f1 == [1, 1, 0]
    odds = {"right": 0.0, "marks": 0.0, "wrong": 2.0}
    found = metrics.score(gold, predictions, odds, 1.0, rule.best_scores)
    assert found["NoAns_exact"] == found["NoAns_f1"] == 100.0


def test_thresholds_go_by_the_rule():
    rule = metric_rules.find("mlqa", "zh")
    gold, odds = {"a": ("天气很好",), "b": ()}, {"a": 0.0, "b": 3.0}
    predictions = {"a": "天气", "b": "上海"}
    by_squad = metrics.score(gold, predictions, odds)
    by_rule = metrics.score(gold, predictions, odds, 1.0, rule.best_scores)
    assert (by_squad["best_f1"], by_squad["best_f1_thresh"]) == (50.0, 0.0)
    assert (by_rule["best_f1"], by_rule["best_f1_thresh"]) == (50 * (1 + 2 / 3), 0.0)


def test_squad_is_the_official_function_itself():
    assert metric_rules.SQUAD.best_scores is metrics.best_scores
    assert metric_rules.find("squad", "zh") == metric_rules.SQUAD


def test_a_language_that_is_missing_or_unknown():
    with pytest.raises(UserError, match="give --language, one of ar, de, en, es, hi, vi, zh"):
        metric_rules.find("mlqa")
    with pytest.raises(UserError, match="none for fr"):
        metric_rules.find("mlqa", "fr")


def test_cmrc_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk.tokenize", None)
    metric_rules._tokenize.cache_clear()
    with pytest.raises(UserError, match="pip install nltk"):
        metric_rules.find("cmrc")
