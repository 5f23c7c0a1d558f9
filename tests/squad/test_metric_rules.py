"""Each benchmark's rule against figures that its official script gave (tests/golden)."""

import builtins
import json
from collections import Counter
from pathlib import Path

import pytest

from kdfast.errors import UserError
from kdfast.squad import metric_rules, metrics
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
    found = metrics.score({"q": tuple(case["golds"])}, {"q": case["answer"]}, None, 1.0, rule.best_scores)
    assert (found["exact"], found["f1"]) == (case["exact"], case["f1"])
