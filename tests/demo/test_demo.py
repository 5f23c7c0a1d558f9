import json

import pytest

from kdfast import train
from kdfast.demo import corpus, demo

pytestmark = pytest.mark.program


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The demo over a corpus of a few passages and two steps a student."""
    monkeypatch.chdir(tmp_path)
    write = corpus.write_corpus
    monkeypatch.setattr(
        demo.corpus,
        "write_corpus",
        lambda folder: write(folder, train_questions=40, validation_questions=20),
    )
    monkeypatch.setattr(demo, "SETTINGS", {**demo.SETTINGS, "max_steps": 2})
    return tmp_path / "kdfast-demo"


def test_without_arguments_the_demo_ends_with_one_table(small, capsys):
    assert train.main([]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    header, _, *rows = [line for line in lines if line.startswith("|")]
    assert "EM | F1" in header and "windows/s" not in header  # it measured unlike things
    names = [row.split("|")[1].strip() for row in rows]
    assert names == ["teacher", "student, distilled", "student, gold spans alone"]
    plain = json.loads((small / "undistilled/run.json").read_text())
    distilled = json.loads((small / "distilled/run.json").read_text())
    assert plain["config"]["distillation_loss_weight"] == 0 and plain["teacher_cache"] is None
    assert distilled["teacher_cache"]
    # The two differ in nothing else.
    for record in (plain, distilled):
        for name in ("distillation_loss_weight", "output_dir"):
            del record["config"][name]
    assert plain["config"] == distilled["config"]
    assert f"{distilled['metrics']['f1']:.1f}" in rows[1]


def test_the_demo_runs_twice(small, capsys):
    assert train.main([]) == 0
    first = capsys.readouterr().out
    assert train.main([]) == 0
    second = capsys.readouterr().out
    assert "Teacher logits: cache" in second and "Teacher logits: cache" not in first
