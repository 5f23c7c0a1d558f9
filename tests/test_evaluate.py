import json

import pytest

from kdfast import evaluate
from tests import corpora


@pytest.fixture
def files(tmp_path):
    """A function that writes predictions (and odds) and runs the program on them."""
    data = corpora.write(tmp_path / "dev.json", 3)

    def run(predictions, *flags, odds=None):
        names = []
        for role, content in (("predictions", predictions), ("null_odds", odds)):
            if content is not None:
                path = tmp_path / f"{role}.json"
                path.write_text(content if isinstance(content, str) else json.dumps(content))
                names += [f"--{role}", str(path)]
        return evaluate.main(["--data", data, *names, *flags])

    return run


RIGHT = {"q0": "Rollo", "q1": "the harald!", "q2": "Anna", "n0": "", "n1": "", "n2": ""}


def test_official_figures_of_files(files, capsys, tmp_path):
    assert files({**RIGHT, "q2": "Anna then", "n2": "winter"}, "--output_dir", str(tmp_path)) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["exact"] == pytest.approx(100 * 4 / 6)
    assert scores["f1"] == pytest.approx(100 * (4 + 2 / 3) / 6)
    assert scores["HasAns_total"] == scores["NoAns_total"] == 3
    assert json.loads((tmp_path / "metrics.json").read_text()) == scores


def test_odds_above_the_threshold_mean_no_answer(files, capsys):
    odds = {**dict.fromkeys(RIGHT, 0.0), "q0": 0.5, "q1": 2.0}
    assert files(RIGHT, odds=odds) == 0
    assert json.loads(capsys.readouterr().out)["HasAns_exact"] == pytest.approx(200 / 3)
    assert files(RIGHT, "--null_threshold", "0.1", odds=odds) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["HasAns_exact"] == pytest.approx(100 / 3)
    assert scores["best_exact"] == 100.0 and scores["best_exact_thresh"] == 2.0


def test_missing_and_unknown_predictions_are_said(files, capsys):
    partial = {key: value for key, value in RIGHT.items() if key != "q0"} | {"zz": "?"}
    assert files(partial) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["HasAns_exact"] == pytest.approx(200 / 3)
    assert "1 questions without a prediction" in captured.err and "zz" in captured.err


@pytest.mark.parametrize(
    ("predictions", "odds", "words"),
    [
        ("{", None, "not JSON"),
        ([], None, "none of the data's question ids"),
        ([3], None, "no object at [0]"),
        ({"q0": 3}, None, "give a text"),
        (RIGHT, {"q0": "high"}, "give a finite number"),
        (RIGHT, {**dict.fromkeys(RIGHT, 0.0), "q0": float("inf")}, "give a finite number"),
        (RIGHT, {**dict.fromkeys(RIGHT, 0.0), "q0": 10**400}, "give a finite number"),
        ("[" * 100_000, None, "not JSON"),
        (None, {"q0": 1.0}, "either --model or --predictions"),
    ],
)
def test_faults_are_one_sentence(files, capsys, predictions, odds, words):
    assert files(predictions, odds=odds) == 2
    assert words in capsys.readouterr().err


def test_flags_that_contradict(files, capsys, tmp_path):
    assert files(RIGHT, "--model", "m") == 2
    assert "not both" in capsys.readouterr().err
    assert evaluate.main(["--predictions", "p"]) == 2
    assert "--data is missing" in capsys.readouterr().err
    assert files(RIGHT, "--output_dir", "/proc/kdfast") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert evaluate.main(["--data", "d.json", "--predictions", str(tmp_path / "no")]) == 2
    assert "d.json" in capsys.readouterr().err


def test_the_rule_of_a_benchmark(tmp_path, capsys):
    context = "天气很好，我们去公园。"
    asked = {"id": "q", "question": "天气怎么样？"}
    asked["answers"] = [{"text": "天气很好", "answer_start": 0}]
    data = {"data": [{"paragraphs": [{"context": context, "qas": [asked]}]}]}
    (tmp_path / "d.json").write_text(json.dumps(data))
    (tmp_path / "p.json").write_text(json.dumps({"q": "天气"}))

    def run(*flags):
        files = ["--data", str(tmp_path / "d.json"), "--predictions", str(tmp_path / "p.json")]
        status = evaluate.main([*files, "--output_dir", str(tmp_path), *flags])
        return status, *capsys.readouterr()

    for flags, named, f1 in (
        ((), {"metric": "squad"}, 0),
        (("--metric", "mlqa", "--language", "zh"), {"metric": "mlqa", "language": "zh"}, 200 / 3),
        (("--metric", "mlqa", "--language", "de"), {"metric": "mlqa", "language": "de"}, 0),
        (("--metric", "cmrc"), {"metric": "cmrc"}, 200 / 3),
        (("--metric", "korquad"), {"metric": "korquad"}, 200 / 3),
    ):
        status, out, err = run(*flags)
        found = json.loads(out)
        assert status == 0 and found == json.loads((tmp_path / "metrics.json").read_text())
        assert found["f1"] == pytest.approx(f1) and found.items() >= named.items()
        assert ("Scored by" in err) == bool(flags)
    for flags, words in (
        (("--metric", "mlqa"), "give --language, one of ar"),
        (("--metric", "mlqa", "--language", "ja"), "none for ja"),
        (("--language", "zh"), "goes with --metric mlqa"),
        (("--metric", "rouge"), "rouge"),
    ):
        status, out, err = run(*flags)
        assert (status, out, err.count("\n")) == (2, "", 1) and words in err
