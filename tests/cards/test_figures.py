"""Pictures show what the result files hold, and only where they hold it."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from kdfast import card as program
from kdfast.cards import figures, run_files


def read(finished):
    return run_files.read_run(finished.folder)


def line(axes, label):
    (found,) = [each for each in axes.lines if each.get_label().startswith(label)]
    return np.asarray(found.get_xdata()), np.asarray(found.get_ydata())


def test_a_run_leaves_its_pictures(finished):
    names = {path.name for path in (finished.folder / "figures").iterdir()}
    assert names == {f"{each}.png" for each in ("loss", "evaluation", "agreement", "tradeoff")}
    for name in names:
        assert (finished.folder / "figures" / name).read_bytes().startswith(b"\x89PNG")


def test_pictures_of_an_earlier_run_go(finished):
    stale = finished.folder / "figures" / "stale.png"
    stale.touch()
    found = figures.save(read(finished))
    assert not stale.exists() and set(found) >= {"figures/loss.png", "figures/evaluation.png"}


def test_the_loss(finished):
    steps = read(finished).steps
    upper, lower = figures.loss(steps).axes
    at, soft = line(upper, "soft")
    assert at.tolist() == [each["step"] for each in steps] == list(range(6))
    # Six steps: a running mean over the last five.
    assert soft[-1] == pytest.approx(np.mean([each["soft"] for each in steps[1:]]))
    assert soft[2] == pytest.approx(np.mean([each["soft"] for each in steps[:3]]))
    assert list(lower.lines[0].get_ydata()) == [each["lr"] for each in steps]
    steps[3]["hard"] = None  # what the log holds for a loss that is not finite
    _, hard = line(figures.loss(steps).axes[0], "hard")
    there = [each["hard"] for each in steps[1:] if each["hard"] is not None]
    assert hard[-1] == pytest.approx(np.mean(there))
    for each in steps:
        each["soft"] = 0.0  # a run without a teacher
    labels = [each.get_label() for each in figures.loss(steps).axes[0].lines]
    assert not any(label.startswith("soft") for label in labels)
    assert figures.loss([]) is None


def test_evaluations(finished):
    evaluations = read(finished).evaluations
    (axes,) = figures.evaluation(evaluations).axes
    assert line(axes, "F1")[0].tolist() == [3, 6]
    assert line(axes, "F1")[1].tolist() == [each["f1"] for each in evaluations]
    assert line(axes, "exact match")[1].tolist() == [each["exact"] for each in evaluations]
    assert figures.evaluation(evaluations[:1]) is None


def question(exact, other_exact, answer="a", other="b"):
    return {
        "answer": answer,
        "exact": exact,
        "compared": {"answer": other, "exact": other_exact},
    }


def test_shares_of_agreement():
    lines = [
        question(1, 1),
        question(1, 1),
        question(1, 0),
        question(0, 1),
        question(0, 0, "The cat!", "cat"),  # one answer to the official script
        question(0, 0),
        question(0, 0),
        question(0, 0, "", "b"),
    ]
    shares = figures.agreement_shares(dict(enumerate(lines)))
    assert list(shares.values()) == [25.0, 12.5, 12.5, 12.5, 37.5]


def test_no_agreement_without_another_model(finished):
    (finished.folder / "eval" / "dev.questions.json").unlink()
    assert figures.agreement(read(finished)) is None


def test_quality_against_latency(finished, tmp_path):
    """Models of two runs: a teacher that both name is there once, another machine's is not."""
    other = tmp_path / "undistilled"
    shutil.copytree(finished.folder, other)
    path = other / "eval" / "dev.eval.json"
    result = json.loads(path.read_text())
    own = run_files.read_run(other)
    own.results[0]["model"]["weights_sha256"] = "1" * 64
    own.config["distillation_loss_weight"] = 0.0
    runs = [read(finished), own]
    found = figures.points(runs[0].results[0], runs)
    assert list(found) == ["finished (student)", "teacher (teacher)", "undistilled (baseline)"]
    teacher = found["teacher (teacher)"]
    assert teacher.f1 == result["compared"]["metrics"]["f1"]
    assert teacher.latency == result["compared_with"]["latency"]["median_ms"]
    assert teacher.parameters == result["compared_with"]["parameters"]
    (axes,) = figures.tradeoff(*runs[:1], runs[1:]).axes
    assert axes.get_ylabel() == "F1 on dev"
    drawn = [tuple(each.get_offsets()[0]) for each in axes.collections]
    assert drawn == [(each.latency, each.f1) for each in found.values()]

    own.results[0]["hardware"]["cpu"] = "another"
    assert [len(figures.points(each.results[0], runs)) for each in runs] == [2, 2]
    del own.results[0]["compared"]
    assert figures.tradeoff(own) is None
    own.results.clear()
    assert figures.tradeoff(own) is None


def test_without_matplotlib(finished, monkeypatch, capsys):
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    (finished.folder / "README.md").unlink()
    assert program.main(["--model_dir", str(finished.folder), "--report"]) == 0
    said = capsys.readouterr().out
    assert said.count("matplotlib is absent") == 1
    assert "![" not in (finished.folder / "README.md").read_text()
    assert "<img" not in (finished.folder / "report.html").read_text()
