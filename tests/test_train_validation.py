"""Evaluation in a run: on several files, and on whole articles of the training data."""

import json

import numpy as np
import pytest

from kdfast.common.errors import UserError
from kdfast.config import TrainConfig
from kdfast.data.examples import Example
from kdfast.data.held_out import choose_articles
from kdfast.data.read import read_examples
from kdfast.training import checkpoint
from tests import corpora
from tests.programs import World, config_of, log_of, ranks_of

FIGURES = ("exact", "f1")


@pytest.fixture
def world(tmp_path):
    found = World(tmp_path)
    found.other = corpora.write(tmp_path / "other.json", 9)
    return found


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


def evaluations_of(folder):
    return [line for line in log_of(folder) if "evaluated_after" in line]


def test_several_files_have_figures_of_their_own_and_a_mean(world, capsys):
    flags = {"eval_steps": 3, "save_steps": 3, "load_best_model_at_end": True}
    both = [world.validation_file, world.other]
    alone = []
    for number, file in enumerate(both):
        place = world.path / str(number)
        assert world.run(**flags, validation_file=file, output_dir=place) == 0
        alone.append(evaluations_of(place))
    assert world.run(**flags, validation_file=both, metric=["squad", "korquad"]) == 0
    assert "mean exact" in capsys.readouterr().out
    for first, second, line in zip(*alone, evaluations_of(world.output), strict=True):
        one, other = line["files"]
        assert (one.pop("file"), one.pop("metric")) == (both[0], "squad")
        assert (other["file"], other["metric"]) == (both[1], "korquad")
        assert one == {name: first[name] for name in one}
        assert other["total"] == second["total"] == 18 and line["total"] == 28
        for name in FIGURES:
            assert line[name] == pytest.approx((one[name] + other[name]) / 2)
    record = record_of(world.output)
    best = max(evaluations_of(world.output), key=lambda line: line["f1"])
    assert record["best_f1"] == best["f1"] and len(record["metrics"]["files"]) == 2
    text = (world.output / "README.md").read_text()
    one, other = best["files"]
    assert f"On `dev.json`, in the run itself: EM {one['exact']:.2f}, F1 {one['f1']:.2f}" in text
    assert f"On `other.json`, in the run itself: EM {other['exact']:.2f}" in text
    assert f"The mean of these: EM {best['exact']:.2f}, F1 {best['f1']:.2f}." in text
    assert "**Eval data:** `dev.json`, `other.json`" in text and "name: other.json" in text
    checkpoint.set_aside(world.output / "checkpoint-6")
    whole = log_of(world.output)
    again = {**flags, "resume_from_checkpoint": "last", "report": True}
    assert world.run(**again, validation_file=both, metric=["squad", "korquad"]) == 0
    assert log_of(world.output) == whole
    page = (world.output / "report.html").read_text()
    assert "this model on other.json" in page and "dev.json and other.json, the mean" in page


def test_one_file_is_logged_as_by_earlier_versions(world):
    assert world.run(eval_steps=6) == 0
    (line,) = evaluations_of(world.output)
    record = record_of(world.output)
    assert "files" not in line and "files" not in record["metrics"]
    assert record["metric"] == "squad"
    assert config_of(world.output)["validation_file"] == world.validation_file


def examples(*titles):
    return [Example(str(n), title, "q", f"context {n}", ()) for n, title in enumerate(titles)]


def test_articles_are_held_out_whole_and_the_same_ones_of_every_file():
    first = examples(*(f"T{n // 3}" for n in range(60)))
    found = choose_articles([("a", first)], 0.2, 42)
    assert len(found) == 4 and found == choose_articles([("a", first)], 0.2, 42)
    assert found != choose_articles([("a", first)], 0.2, 43)
    assert found <= choose_articles([("a", first)], 0.5, 42)
    # A file with the same articles among others gives up these, too.
    more = [*first, *examples(*(f"U{n}" for n in range(60)))]
    both = choose_articles([("a", first), ("b", more)], 0.2, 42)
    assert found <= both and sum(each.title in both for each in more) >= 24
    untitled = examples(*[""] * 10)
    assert len(choose_articles([("c", untitled)], 0.3, 1)) == 3
    with pytest.raises(UserError, match="leave none of the 1 of d"):
        choose_articles([("d", examples("T", "T"))], 0.1, 1)


def test_a_split_is_not_trained_on_and_is_what_is_evaluated(world, capsys):
    flags = {"validation_file": None, "validation_split": 0.2, "train_languages": ["en"]}
    flags |= {"num_train_epochs": 1, "max_steps": None, "save_steps": 2}
    assert world.run(**flags) == 0
    config = TrainConfig(train_file=world.train_file, validation_split=0.2)
    questions = read_examples(world.train_file)
    held = choose_articles([("", questions)], 0.2, config.optimization.seed)
    count = sum(each.title in held for each in questions)
    said = capsys.readouterr().out
    assert f"{count} questions of {len(held)} articles are held out for evaluation." in said
    record = record_of(world.output)
    assert record["questions"]["left_out"] == {"held_out": count}
    assert record["questions"]["trained"] == 40 - count == record["train_windows"]
    assert record["metrics"]["total"] == count == 8
    text = (world.output / "README.md").read_text()
    assert "On `train.json (held out)`, in the run itself: EM " in text
    whole = log_of(world.output)
    for number in (2, 4):
        for folder in checkpoint.list_checkpoints(world.output)[number // 2 :]:
            checkpoint.set_aside(folder)
    assert world.run(**flags, resume_from_checkpoint="last") == 0
    assert log_of(world.output) == whole
    wrong = {**flags, "validation_split": 0.4}
    assert world.run(**wrong, resume_from_checkpoint="last") == 2
    assert "validation_split (0.2 -> 0.4)" in capsys.readouterr().err


def test_held_out_articles_of_an_unlabelled_copy_are_not_trained_on(world):
    """As augmented copies have the titles of their articles."""
    flags = {"validation_file": None, "validation_split": 0.2, "max_steps": 2}
    flags |= {"unlabelled_file": world.train_file, "stage": "both", "eval_steps": 1}
    assert world.run(**flags, early_stopping_patience=5) == 0
    for stage in ("layers", "predictions"):
        record = record_of(world.output / stage)
        assert [each["left_out"] for each in record["questions"]["files"]] == [{"held_out": 8}] * 2
    assert record["metrics"]["total"] == 8


def test_the_windows_of_a_split_are_those_of_a_file_of_its_questions(world):
    """Also at two ranks."""
    flags = {"validation_file": None, "validation_split": 0.3, "max_steps": 2}
    assert world.run(**flags, output_dir=world.path / "split") == 0
    questions = read_examples(world.train_file)
    held = choose_articles([("", questions)], 0.3, 42)
    content = json.loads((world.path / "train.json").read_text())
    for name, wanted in (("held.json", True), ("rest.json", False)):
        data = [each for each in content["data"] if (each["title"] in held) == wanted]
        (world.path / name).write_text(json.dumps({"data": data}))
    files = {"train_file": world.path / "rest.json", "validation_file": world.path / "held.json"}
    assert world.run(max_steps=2, output_dir=world.path / "files", **files) == 0
    one, other = record_of(world.path / "split"), record_of(world.path / "files")
    assert one["train_windows"] == other["train_windows"]
    assert one["metrics"]["total"] == other["metrics"]["total"]
    statuses, said = ranks_of(world, 2, **flags)
    assert statuses == [0, 0], said
    assert record_of(world.output)["metrics"]["total"] == one["metrics"]["total"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"validation_split": 0.1}, "--validation_file and --validation_split exclude each other"),
        ({"metric": ["squad", "mlqa"]}, "are 2 for 1 files: give one for each, or one for all"),
        ({"metric": "f1"}, "--metric is 'f1': give one of squad, mlqa, cmrc, korquad"),
        ({"metric": "mlqa"}, "language"),
        ({"validation_file": None, "validation_split": 0.95}, "--validation_split is 0.95"),
        ({"validation_file": None, "validation_split": 0.1, "report": True}, "--report needs"),
        ({"validation_file": ["{dev}", ""]}, "--validation_file is given an empty name"),
        ({"validation_file": ["{dev}", "absent.json"]}, "'absent.json': no such file"),
    ],
)
def test_mistakes(world, capsys, flags, message):
    for name, value in flags.items():
        if isinstance(value, list):
            flags[name] = [each.format(dev=world.validation_file) for each in value]
    assert world.run(**flags) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_mlqa_takes_a_language_for_each_file(world):
    files = {"validation_file": [world.validation_file, world.other], "metric": "mlqa"}
    assert world.run(**files, language="en,zh", max_steps=1) == 0
    one, other = record_of(world.output)["metrics"]["files"]
    assert (one["language"], other["language"]) == ("en", "zh")
    assert np.isfinite([one["f1"], other["f1"]]).all()
