"""The search for spans against all spans tried one by one, and the texts made of them."""

import json
import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from kdfast.common.errors import UserError
from kdfast.evaluation import spans as spans_module
from kdfast.evaluation.answers import best_spans, predictions, write_predictions
from kdfast.evaluation.spans import TokenScores, top_spans

SUFFIX = 1


class FakeWindows:
    """What answers.py uses of `Windows`; a context token is one character and a space."""

    def __init__(self, question, prefix, count, first_token=None):
        self.question = np.array(question, dtype=np.int32)
        self.prefix = np.array(prefix, dtype=np.int32)
        self.count = np.array(count, dtype=np.int32)
        self.first_token = np.zeros_like(self.count) if first_token is None else first_token
        self.lengths = self.prefix + self.count + SUFFIX
        self.window_start = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        self.question_ids = [f"q{i}" for i in range(max(question, default=-1) + 1)]

    def char_span(self, window, start, end):
        shift = np.asarray(self.first_token)[window] - self.prefix[window]
        return 2 * (start + shift), 2 * (end + shift) + 1


def all_spans(windows, start_scores, end_scores, longest, combine):
    """Per question every (window, start, end) in the documented order, tried one by one."""
    found = [[] for _ in windows.question_ids]
    for w, question in enumerate(windows.question.tolist()):
        base, low = int(windows.window_start[w]), int(windows.prefix[w])
        for start in range(low, low + int(windows.count[w])):
            for end in range(start, low + int(windows.count[w])):
                total = combine(float(start_scores[base + start]), float(end_scores[base + end]))
                if end - start < longest and total > -math.inf:
                    found[question].append((-total, w, start, end))
    return [[span[1:] for span in sorted(spans)] for spans in found]


def listed(window, start, end):
    """The rows of (Q, n) arrays as lists of tuples; checks that -1 only fills up the end."""
    rows = []
    for row in zip(window.tolist(), start.tolist(), end.tolist(), strict=True):
        cells = list(zip(*row, strict=True))
        real = [cell for cell in cells if cell != (-1, -1, -1)]
        assert cells[: len(real)] == real
        rows.append(real)
    return rows


def random_windows(draw, windows=12, questions=5, longest=25):
    question = np.concatenate([np.arange(questions), draw.integers(questions, size=windows)])
    # Windows of a question need not stand together.
    draw.shuffle(question)
    prefix = draw.integers(1, 6, size=len(question))
    count = draw.integers(longest + 1, size=len(question)) * (draw.random(len(question)) > 0.15)
    return FakeWindows(question.tolist(), prefix, count)


KINDS = {
    "reals": lambda draw, n: draw.normal(size=(n, 2)),
    "ties": lambda draw, n: draw.integers(-2, 3, size=(n, 2)),
    "all equal": lambda draw, n: np.full((n, 2), 0.25),
    "some -inf": lambda draw, n: np.where(
        draw.random((n, 2)) < 0.4, -np.inf, draw.integers(3, size=(n, 2))
    ),
    "all -inf": lambda draw, n: np.full((n, 2), -np.inf),
    # float32 sums of these overflow, or swallow the smaller logit.
    "huge": lambda draw, n: (
        draw.choice([-3e38, -1.0, 1.0, 3e7, 3e38], size=(n, 2)) + draw.integers(3, size=(n, 2))
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1, 60, 1 << 15])
def test_equals_all_spans_tried_one_by_one(kind, block, monkeypatch):
    monkeypatch.setattr(spans_module, "BLOCK_CELLS", block)
    draw = np.random.default_rng([block, len(kind)])
    for n_best in (1, 2, 20, 2000):
        for longest in (1, 3, 8, 30):
            windows = random_windows(draw)
            logits = KINDS[kind](draw, int(windows.window_start[-1])).astype(np.float32)
            expected = all_spans(windows, *logits.T, longest, lambda a, b: a + b)
            found = best_spans(windows, logits, max_answer_length=longest, n_best_size=n_best)
            assert found.window.shape == (len(windows.question_ids), n_best)
            rows = listed(found.window, found.start, found.end)
            assert rows == [spans[:n_best] for spans in expected]
            for q, spans in enumerate(rows):
                for i, (window, start, end) in enumerate(spans):
                    base = windows.window_start[window]
                    assert found.start_logit[q, i] == logits[base + start, 0]
                    assert found.end_logit[q, i] == logits[base + end, 1]
                assert (found.start_logit[q, len(spans) :] == -np.inf).all()


def test_another_ranking_uses_the_same_search():
    draw = np.random.default_rng(5)
    for n_best in (1, 4, 500):
        windows = random_windows(draw)
        weights = np.exp(draw.integers(-3, 3, size=(int(windows.window_start[-1]), 2)))
        weights[draw.random(weights.shape) < 0.2] = 0.0
        weights /= weights.sum(axis=0)
        expected = all_spans(windows, *weights.T, 5, lambda a, b: a * b)
        first = windows.window_start[:-1] + windows.prefix
        questions = len(windows.question_ids)
        window, start, end = top_spans(
            TokenScores(*weights.T, first, windows.count, windows.question, questions),
            max_answer_length=5,
            n_best_size=n_best,
            combine=np.multiply,
        )
        prefix = np.where(window >= 0, windows.prefix[window], 0)
        rows = listed(window, start + prefix, end + prefix)
        assert rows == [spans[:n_best] for spans in expected]


def test_wide_windows_worked_out():
    # One window of 200 context tokens; the best pair is 30 tokens long, a better one is 31.
    windows = FakeWindows([0], [4], [200])
    logits = np.zeros((205, 2), dtype=np.float32)
    logits[[4 + 100, 4 + 99], 0] = 5.0, 6.0
    logits[4 + 129, 1] = 5.0
    found = best_spans(windows, logits, n_best_size=3)
    assert (found.start[0, 0], found.end[0, 0]) == (104, 133)
    # Then what start 99 gives with an end of logit 0, the shorter first.
    assert found.start[0, 1:].tolist() == [103, 103]
    assert found.end[0, 1:].tolist() == [103, 104]


def test_null_is_the_lowest_window_and_question_tokens_are_no_answers():
    windows = FakeWindows([0, 1, 0], [3, 3, 3], [2, 2, 2])
    logits = np.zeros((18, 2), dtype=np.float32)
    logits[[1, 2, 5]] = 100.0
    logits[0] = 4.0, 1.0
    logits[6] = 9.0, 9.0
    logits[12] = 0.5, 2.5
    found = best_spans(windows, logits)
    assert found.null_score.tolist() == [3.0, 18.0]
    assert found.null_logits.tolist() == [[0.5, 2.5], [9.0, 9.0]]
    assert found.start[found.window >= 0].min() == 3
    assert found.end.max() == 4


def test_no_windows_at_all():
    found = best_spans(FakeWindows([], [], []), np.zeros((0, 2), dtype=np.float32))
    assert found.window.shape == (0, 20)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_name_the_question(value):
    windows = FakeWindows([0, 1], [2, 2], [3, 3])
    logits = np.zeros((12, 2), dtype=np.float32)
    logits[8, 1] = value
    with pytest.raises(UserError, match="question 'q1' hold NaN or infinity"):
        best_spans(windows, logits)


def test_wrong_shape_and_sizes_are_refused():
    windows = FakeWindows([0], [2], [3])
    with pytest.raises(ValueError, match=r"must be \(6, 2\), but are \(5, 2\)"):
        best_spans(windows, np.zeros((5, 2), dtype=np.float32))
    for sizes in ({"n_best_size": 0}, {"max_answer_length": 0}):
        with pytest.raises(UserError, match="at least 1"):
            best_spans(windows, np.zeros((6, 2), dtype=np.float32), **sizes)


def example(key, context):
    return SimpleNamespace(id=key, context=context)


def test_texts_probabilities_and_odds_worked_out():
    # Two windows of one question over "x y z", the second begins at token 1.
    windows = FakeWindows([0, 0], [2, 2], [2, 2], first_token=[0, 1])
    logits = np.full((10, 2), -np.inf, dtype=np.float32)
    logits[0] = 1.0, 1.0
    logits[5] = 0.5, 1.0
    logits[2, 0], logits[3, 1] = 2.0, 0.5  # "x y", 2.5
    logits[8, 0], logits[8, 1] = 0.25, 0.25  # "z", 0.5
    spans = best_spans(windows, logits)
    result = predictions(spans, windows, [example("q0", "x y z")])
    # The lower null, 1.5, stands between the two spans.
    weights = [math.exp(2.5), math.exp(1.5), math.exp(0.5)]
    shares = [weight / sum(weights) for weight in weights]
    assert [list(entry) for entry in result.nbest["q0"]] == 3 * [
        ["start_logit", "end_logit", "text", "probability"]
    ]
    assert [entry["text"] for entry in result.nbest["q0"]] == ["x y", "", "z"]
    assert [entry["start_logit"] for entry in result.nbest["q0"]] == [2.0, 0.5, 0.25]
    assert [entry["end_logit"] for entry in result.nbest["q0"]] == [0.5, 1.0, 0.25]
    assert [entry["probability"] for entry in result.nbest["q0"]] == pytest.approx(shares)
    assert result.null_odds == {"q0": -1.0}
    assert result.predictions == {"q0": "x y"}

    # Odds equal to the threshold are not above it.
    for threshold, text in ((-1.0, "x y"), (-1.0001, "")):
        result = predictions(spans, windows, [example("q0", "x y z")], threshold)
        assert result.predictions == {"q0": text}
        assert result.never_null == {"q0": "x y"}


def one_window(null, words):
    """Windows and logits of one question: tokens of these scores, no span longer than one."""
    windows = FakeWindows([0], [1], [len(words)])
    logits = np.full((len(words) + 2, 2), -np.inf, dtype=np.float32)
    logits[0] = null, 0.0
    logits[1:-1, 0], logits[1:-1, 1] = words, 0.0
    return windows, logits


@pytest.mark.parametrize(
    ("null", "n_best", "texts"),
    [
        (9.0, 3, ["", "c", "b"]),
        (2.0, 3, ["c", "b", ""]),  # equal to "b": the span goes first
        (1.0, 3, ["c", "b", "a", ""]),
        (-5.0, 3, ["c", "b", "a", ""]),
        (-5.0, 20, ["c", "b", "a", ""]),
        (-5.0, 1, ["c", ""]),
        (9.0, 1, ["", "c"]),
    ],
)
def test_the_null_answer_among_the_n_best(null, n_best, texts):
    windows, logits = one_window(null, [1.0, 2.0, 3.0])
    spans = best_spans(windows, logits, max_answer_length=1, n_best_size=n_best)
    result = predictions(spans, windows, [example("q0", "a b c")])
    assert [entry["text"] for entry in result.nbest["q0"]] == texts
    assert sum(entry["probability"] for entry in result.nbest["q0"]) == pytest.approx(1)
    assert result.null_odds == {"q0": null - 3.0}
    assert result.predictions == {"q0": "" if null > 3 else "c"}
    assert result.never_null == {"q0": "c"}


@pytest.mark.parametrize(("null", "text"), [(1.5, ""), (-1.5, "empty")])
def test_a_question_without_a_span(null, text):
    windows, logits = one_window(null, [])
    result = predictions(best_spans(windows, logits), windows, [example("q0", " ")])
    assert [entry["text"] for entry in result.nbest["q0"]] == ["empty", ""]
    share = 1 / (1 + math.exp(null))
    assert result.nbest["q0"][0]["probability"] == pytest.approx(share)
    assert result.null_odds == {"q0": null}
    assert result.predictions == {"q0": text}
    assert result.never_null == {"q0": "empty"}


def test_a_span_without_text_is_not_the_answer():
    windows, logits = one_window(0.0, [1.0, 5.0])

    class EmptySecond(FakeWindows):
        def char_span(self, window, start, end):
            low, high = super().char_span(window, start, end)
            return low, np.where(start == 2, low, high)

    windows.__class__ = EmptySecond
    spans = best_spans(windows, logits, max_answer_length=1)
    result = predictions(spans, windows, [example("q0", "a b")])
    assert [entry["text"] for entry in result.nbest["q0"]] == ["", "a", ""]
    assert result.never_null == {"q0": "a"}
    assert result.null_odds == {"q0": -1.0}


def test_chinese_and_arabic_texts_and_the_files(tmp_path):
    windows = FakeWindows([0, 1], [1, 1], [3, 2])
    logits = np.zeros((9, 2), dtype=np.float32)
    logits[2, 0], logits[3, 1] = 3.0, 4.0
    logits[6, 0], logits[6, 1] = 5.0, 6.0
    contexts = [example("q1", "م ن"), example("q0", "中 国 人")]
    result = predictions(best_spans(windows, logits), windows, contexts)
    assert result.predictions == {"q0": "国 人", "q1": "م"}
    assert result.null_odds == {"q0": -7.0, "q1": -11.0}
    write_predictions(result, tmp_path)
    for name, content in (
        ("predictions", result.predictions),
        ("nbest_predictions", result.nbest),
        ("null_odds", result.null_odds),
    ):
        assert json.loads((tmp_path / f"{name}.json").read_text()) == content
    with pytest.raises(ValueError, match="'q1'"):
        predictions(best_spans(windows, logits), windows, contexts[1:])


def test_entries_fall_and_equal_a_plain_sort():
    """The lists of random questions against the rule written out: sort, cut, put null back."""
    draw = np.random.default_rng(8)
    for n_best in (2, 5, 50):
        windows = random_windows(draw)
        logits = draw.integers(-3, 4, size=(int(windows.window_start[-1]), 2)).astype(np.float32)
        context = " ".join(chr(ord("A") + i) for i in range(26))
        examples = [example(key, context) for key in windows.question_ids]
        spans = best_spans(windows, logits, max_answer_length=4, n_best_size=n_best)
        result = predictions(spans, windows, examples)
        every = all_spans(windows, *logits.T, 4, lambda a, b: a + b)
        for q, key in enumerate(windows.question_ids):
            rows = [
                (
                    float(logits[windows.window_start[w] + s, 0]),
                    float(logits[windows.window_start[w] + e, 1]),
                    context[2 * (s - windows.prefix[w]) : 2 * (e - windows.prefix[w]) + 1],
                )
                for w, s, e in every[q]
            ]
            firsts = windows.window_start[:-1][windows.question == q]
            null = min(((*logits[i].tolist(), "") for i in firsts), key=lambda row: sum(row[:2]))
            expected = sorted([*rows, null], key=lambda row: -sum(row[:2]))[:n_best]
            if not any(row[2] == "" for row in expected):
                expected.append(null)
            if rows:
                entries = result.nbest[key]
                assert [tuple(entry.values())[:3] for entry in entries] == expected
                assert result.null_odds[key] == sum(null[:2]) - sum(rows[0][:2])
                shares = [entry["probability"] for entry in entries]
                assert all(a >= b for a, b in pairwise(shares))
