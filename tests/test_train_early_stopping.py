"""Early stopping: after how many evaluations without a gain, killed or not, and what is left."""

import json

import pytest

from kdfast.training import checkpoint, results
from tests.programs import log_of, ranks_of
from tests.test_train_best import scores  # noqa: F401

FLAGS = {
    "eval_steps": 1,
    "save_steps": 1,
    "save_total_limit": 9,
    "early_stopping_patience": 2,
    "max_steps": 8,
}


def record_of(world):
    return json.loads((world.output / "run.json").read_text())


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "given, flags, steps, best",
    [
        ([1, 3, 2, 2, 9], {}, 4, 2),
        ([1, 3, 3, 3, 9], {}, 4, 2),  # an equal figure is no gain
        ([1, 3, 2, 4, 2, 2], {}, 6, 4),
        ([1, 1.5, 2, 2.5], {"early_stopping_threshold": 0.6}, 3, 3),  # the best all the same
        ([1, 1.5, 2, 2.5, 4, 3, 3], {"early_stopping_threshold": 0.5}, 3, 3),
        ([9, 8, 7], {"early_stopping_patience": 1}, 2, 1),
    ],
)
def test_a_run_stops_where_it_has_no_gain(world, scores, capsys, given, flags, steps, best):  # noqa: F811
    scores.update(dict(enumerate(given, 1)))
    flags = {**FLAGS, **flags, "load_best_model_at_end": True}
    assert world.run(**flags) == 0
    said = capsys.readouterr().out
    assert f"Stopped early after step {steps} of 8: no gain in " in said
    record = record_of(world)
    assert (record["steps"], record["best_steps"]) == (steps, best)
    patience = flags["early_stopping_patience"]
    assert record["early_stopping"] == {"planned_steps": 8, "evaluations_without_gain": patience}
    # As a whole run ends: the best model in place, the last one kept, and a checkpoint of it.
    assert weights(world.output) == weights(world.output / f"checkpoint-{best}")
    assert weights(world.output / "last") == weights(world.output / f"checkpoint-{steps}")
    assert [each["step"] for each in log_of(world.output) if "step" in each] == [*range(steps)]
    text = (world.output / "README.md").read_text()
    assert f"Training: {steps} optimizer steps, stopped early, of 8 planned (" in text


def test_the_learning_rate_is_that_of_the_whole_run(world, scores):  # noqa: F811
    scores.update(dict.fromkeys(range(1, 9), 1.0))
    assert world.run(**FLAGS, output_dir=world.path / "short") == 0
    assert world.run(**FLAGS | {"early_stopping_patience": None}) == 0
    short, whole = log_of(world.path / "short"), log_of(world.output)
    assert short == whole[: len(short)] and len(whole) == 16 > len(short) == 6
    assert record_of(world)["early_stopping"] is None


@pytest.mark.parametrize("kept", [2, 4, 5])
def test_a_resumed_run_stops_where_the_uninterrupted_one_does(world, scores, kept):  # noqa: F811
    """Also from its last checkpoint, where it does no step more."""
    scores.update({1: 1, 2: 2, 3: 3, 4: 2, 5: 2, 6: 9})
    assert world.run(**FLAGS, output_dir=world.path / "whole") == 0
    assert world.run(**FLAGS) == 0
    for folder in checkpoint.list_checkpoints(world.output)[kept:]:
        checkpoint.set_aside(folder)
    assert world.run(**FLAGS, resume_from_checkpoint="last") == 0
    assert log_of(world.output) == log_of(world.path / "whole")
    assert weights(world.output) == weights(world.path / "whole")
    assert record_of(world)["early_stopping"]["evaluations_without_gain"] == 2


def test_a_run_that_stopped_goes_on_with_more_patience(world, scores):  # noqa: F811
    scores.update({1: 3, 2: 1, 3: 1, 4: 9, 5: 9, 6: 9, 7: 9, 8: 9})
    assert world.run(**FLAGS) == 0 and record_of(world)["steps"] == 3
    patient = {"early_stopping_patience": 4, "resume_from_checkpoint": "last"}
    assert world.run(**FLAGS | patient) == 0
    record = record_of(world)
    assert (record["steps"], record["best_steps"]) == (8, 4)


def test_all_ranks_stop_together(world):
    """By real figures: at a rate of nearly nothing there is no gain."""
    flags = {**FLAGS, "learning_rate": 1e-30}
    statuses, said = ranks_of(world, 2, **flags)
    assert statuses == [0, 0], said
    assert "Stopped early after step 3 of 8" in said[0]


def test_the_best_may_go_by_exact_match(world, monkeypatch):
    figures = {1: (50.0, 10.0), 2: (60.0, 5.0), 3: (40.0, 20.0), 4: (10.0, 20.0)}
    score = results.scoring.Validation.score_unless_stopped

    def scored(self, model, run):
        found = score(self, model, run)
        steps.append(len(steps) + 1)
        found.metrics["f1"], found.metrics["exact"] = figures[steps[-1]]
        return found

    monkeypatch.setattr(results.scoring.Validation, "score_unless_stopped", scored)
    flags = {**FLAGS, "max_steps": 4, "load_best_model_at_end": True}
    for metric, best in (("exact_match", 3), ("f1", 2)):
        steps = []
        place = {"output_dir": world.path / metric, "early_stopping_patience": 9}
        assert world.run(**flags | place, metric_for_best_model=metric) == 0
        folder = world.path / metric
        assert json.loads((folder / "run.json").read_text())["best_steps"] == best
        assert weights(folder) == weights(folder / f"checkpoint-{best}")
        assert (
            f"EM {figures[best][1]:.2f}, F1 {figures[best][0]:.2f}"
            in (folder / "README.md").read_text()
        )
    # Figures by another metric do not compare: the best model so far is forgotten.
    again = {"output_dir": folder, "resume_from_checkpoint": "last"}
    figures[5] = 1.0, 1.0
    assert world.run(**flags | again, metric_for_best_model="exact_match") == 0
    assert json.loads((folder / "run.json").read_text())["best_f1"] == 1.0


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"eval_steps": None}, "--early_stopping_patience needs --eval_steps"),
        ({"validation_file": None, "eval_steps": None}, "needs --validation_file"),
        (
            {"early_stopping_patience": None, "early_stopping_threshold": 1},
            "--early_stopping_threshold needs --early_stopping_patience",
        ),
        ({"early_stopping_patience": 0}, "--early_stopping_patience is 0: give a number above 0"),
    ],
)
def test_mistakes(world, capsys, flags, message):
    assert world.run(**FLAGS | flags) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_stopped_goes_on_by_another_validation_file(world, scores):  # noqa: F811
    """Figures of another file do not compare: no evaluation counts yet."""
    scores.update({1: 3, 2: 1, 3: 1} | {step: 10 * step for step in range(4, 9)})
    assert world.run(**FLAGS) == 0 and record_of(world)["steps"] == 3
    again = {"validation_file": world.train_file, "resume_from_checkpoint": "last"}
    assert world.run(**FLAGS, **again) == 0
    assert record_of(world)["steps"] == 8
    assert weights(world.output) == weights(world.output / "checkpoint-8")
