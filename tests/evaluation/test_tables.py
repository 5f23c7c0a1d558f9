import numpy as np
import pytest

from kdfast.evaluation import bootstrap, tables
from kdfast.evaluation.metrics import QuestionScores


def scored(rows):
    """QuestionScores of (id, exact, f1, has_answer)."""
    ids, exact, f1, has_answer = map(list, zip(*rows, strict=True))
    return QuestionScores(ids, exact, f1, has_answer, [True] * len(ids), [False] * len(ids))


MIXED = scored(
    [("a", 1, 1.0, True), ("b", 0, 0.5, True), ("c", 0, 0.0, True), ("d", 1, 1.0, False)]
)


def test_intervals_of_all_and_of_each_kind():
    found = tables.intervals(MIXED)
    assert set(found) == {
        f"{kind}{name}" for kind in ("", "HasAns_", "NoAns_") for name in ("exact", "f1")
    }
    assert found["NoAns_f1"] == [100.0, 100.0]
    answered = bootstrap.intervals(np.array([[100, 100], [0, 50], [0, 0]]))
    assert found["HasAns_f1"] == answered[:, 1].tolist()
    assert found["HasAns_exact"] == answered[:, 0].tolist()
    every = bootstrap.intervals(np.array([[100, 100], [0, 50], [0, 0], [100, 100]]))
    assert [found["exact"], found["f1"]] == every.T.tolist()


def test_no_interval_of_questions_that_are_not_there():
    assert set(tables.intervals(scored([("a", 1, 1.0, True)]))) == {
        "exact",
        "f1",
        "HasAns_exact",
        "HasAns_f1",
    }


@pytest.mark.parametrize("reverse", [False, True])
def test_worst_forms_go_by_the_original(reverse):
    rows = [
        ("56aa", 1, 1.0, True),
        ("56aa-high-conf-turk0", 0, 0.4, True),
        ("56bb", 0, 0.2, True),
        ("56bb-high-conf-turk1", 1, 1.0, True),
        ("56cc", 1, 1.0, True),
        ("56dd", 1, 1.0, True),
        ("56dd-turk2", 0, 1.0, True),
    ]
    found = tables.worst_forms(scored(rows[::-1] if reverse else rows))
    assert found["metrics"]["total"] == 4
    assert found["metrics"]["exact"] == 25.0
    assert found["metrics"]["f1"] == pytest.approx(100 * (0.4 + 0.2 + 1 + 1) / 4)
    low, high = found["intervals"]["f1"]
    assert low < found["metrics"]["f1"] < high


def test_comparison():
    other = scored(
        [("a", 1, 1.0, True), ("b", 1, 1.0, True), ("c", 0, 0.25, True), ("d", 0, 0.0, False)]
    )
    found = tables.comparison(MIXED, other)
    assert found["exact"]["mean"] == 0.0 and found["exact"]["p"] == 1.0
    assert (found["exact"]["better"], found["exact"]["worse"]) == (1, 1)
    assert found["f1"]["mean"] == pytest.approx(100 * (-0.5 - 0.25 + 1) / 4)
    assert (found["f1"]["better"], found["f1"]["worse"]) == (1, 2)
    low, high = found["f1"]["interval"]
    assert low < 0 < high
    backward = tables.comparison(other, MIXED)["f1"]
    assert backward["mean"] == -found["f1"]["mean"] and backward["p"] == found["f1"]["p"]


def test_other_questions_are_not_compared():
    with pytest.raises(ValueError, match="different questions"):
        tables.comparison(MIXED, scored([("a", 1, 1.0, True)]))


def test_table():
    metrics = {"exact": 50.0, "f1": 62.5, "total": 4, "HasAns_f1": 50.0, "best_f1": 70.0}
    result = {
        "name": "made_up",
        "metrics": metrics,
        "intervals": tables.intervals(MIXED),
        "windows_per_second": 12.34,
        "worst_forms": {"metrics": {"exact": 1.0, "f1": 2.0, "total": 3}, "intervals": {}},
        "compared": {"difference": tables.comparison(MIXED, MIXED)},
    }
    first, second = tables.table([result]).split("\n\n")
    head, rule, row, worst = first.splitlines()
    assert head.count("|") == rule.count("|") == row.count("|") == worst.count("|")
    low, high = result["intervals"]["f1"]
    assert f"| 62.50 [{low:.2f}, {high:.2f}] |" in row and row.endswith("| 70.00 | 12.3 | squad |")
    assert worst == "| made_up, worst forms | 3 | 1.00 | 2.00 |  |  |  |  | squad |"
    assert second.splitlines()[2].startswith("| made_up | +0.00 [+0.00, +0.00] | 1.0000 |")
