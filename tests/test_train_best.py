"""best/ decides what a run publishes: the model that its steps gave; else there is a sentence."""

import json
import os
import shutil
import subprocess

import pytest

from kdfast.common import files
from kdfast.common.errors import UserError
from kdfast.evaluation import scoring
from kdfast.training import checkpoint, results
from kdfast.training.log import TrainLog
from tests.programs import log_of

FLAGS = {
    "save_steps": 2,
    "eval_steps": 2,
    "save_total_limit": 5,
    "load_best_model_at_end": True,
}


@pytest.fixture
def scores(monkeypatch):
    """Step -> F1 of the evaluation there, to be filled."""
    given, at = {}, []
    evaluate, score = results.Results.evaluate_if_due, scoring.Validation.score_unless_stopped

    def evaluate_if_due(self):
        at.append(self.progress.steps)
        evaluate(self)

    def scored(self, model, run):
        evaluation = score(self, model, run)
        evaluation.metrics["f1"] = given[at[-1]]
        return evaluation

    monkeypatch.setattr(results.Results, "evaluate_if_due", evaluate_if_due)
    monkeypatch.setattr(scoring.Validation, "score_unless_stopped", scored)
    return given


def copied(source, target):
    """Copy a run's folder as it is: with links, and the times of its files."""
    subprocess.run(["cp", "-a", source, target], check=True)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def left(output):
    """What a run leaves, without what a clock decides."""
    names = sorted(path.name for path in output.iterdir() if not path.name.startswith("."))
    states = {}
    for folder in checkpoint.list_checkpoints(output):
        states[folder.name] = checkpoint.read_state(folder)
        for name in ("clock", "starts"):
            del states[folder.name]["progress"][name]
    models = {path.relative_to(output): weights(path.parent) for path in output.rglob("model.*")}
    return names, states, models, log_of(output)


def said(capsys):
    """The one sentence of a run that failed."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    return line


def change(name, edit):
    """A fault that rewrites a file of best/ in place, and so in every checkpoint that holds it."""

    def fault(best, other):
        content = bytearray((best / name).read_bytes())
        (best / name).write_bytes(edit(content))

    return fault


def swap(best, other):
    shutil.rmtree(best)
    copied(other, best)


def flip(content):
    content[-3] ^= 4
    return content


FAULTS = {
    "swap with another run's": swap,
    "flip": change("model.safetensors", flip),
    "gone": lambda best, other: shutil.rmtree(best),
    "truncate": change("model.safetensors", lambda content: content[:999]),
    "zero": change("model.safetensors", lambda content: content[:-999] + bytes(999)),
    "empty": change("model.safetensors", lambda content: b""),
    "config": change("config.json", lambda content: content.replace(b"gelu", b"relu")),
    "tokenizer": change("tokenizer.json", lambda content: content.replace(b"#", b"?")),
    "sums": change("SHA256SUMS", flip),
    "file gone": lambda best, other: (best / "config.json").unlink(),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", FAULTS)
def test_a_damaged_best_model_is_not_published_and_a_resume_finds_it(
    world, scores, monkeypatch, capsys, name
):
    scores.update({2: 1.0, 4: 9.0, 6: 5.0})
    other = world.path / "other"
    if FAULTS[name] is swap:
        assert world.run(**FLAGS, output_dir=other, seed=7) == 0
    close = TrainLog.close

    def spoiled(self):
        FAULTS[name](world.output / "best", other / "best")
        close(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainLog, "close", spoiled)
        assert world.run(**FLAGS) == 2
    line = said(capsys)
    best = world.output / "best"
    assert line.startswith(f"error: {best} is not the model that was written after step 4 (")
    assert line.endswith(
        "repeat the command with --resume_from_checkpoint last. The trained student is in "
        f"{world.output}."
    )
    last = weights(world.output / "checkpoint-6")
    assert weights(world.output) == weights(world.output / "last") == last
    assert not (world.output / "run.json").exists()

    assert world.run(**FLAGS, resume_from_checkpoint="last") == 0
    assert weights(world.output) == weights(world.output / "checkpoint-4")
    assert weights(best) == weights(world.output) != last


def test_a_checkpoint_whose_best_model_is_damaged_is_not_used(world, scores, capsys):
    scores.update({2: 9.0, 4: 5.0, 6: 5.0})
    assert world.run(**FLAGS) == 0
    FAULTS["flip"](world.output / "best", None)
    # The three checkpoints hold links to it.
    assert world.run(**FLAGS, resume_from_checkpoint="last") == 2
    line = said(capsys)
    newest = world.output / "checkpoint-6"
    assert "every checkpoint in" in line
    assert f"or delete {newest / 'best'} to go on without the best model so far" in line
    assert world.run(**FLAGS, resume_from_checkpoint=newest) == 2
    assert "is damaged (best/: model.safetensors is not what was written): " in said(capsys)
    shutil.rmtree(newest / "best")
    assert world.run(**FLAGS, resume_from_checkpoint="last") == 0
    assert "f1 of 9.00 is forgotten" in capsys.readouterr().out
    record = json.loads((world.output / "run.json").read_text())
    assert record["best_f1"] == 5.0 and weights(world.output) == weights(newest)


@pytest.mark.parametrize("saved_after_it", [True, False])
def test_a_run_resumed_from_an_earlier_checkpoint_ends_without_the_branch_it_left(
    world, scores, capsys, saved_after_it
):
    """The best score so far stands before the checkpoint, a better one after it."""
    flags = {**FLAGS, "eval_steps": 1, "report_to": "tensorboard"}
    scores.update({1: 3.0, 2: 1.0, 3: 9.0, 4: 1.0, 5: 1.0, 6: 1.0})
    assert world.run(**flags) == 0
    before = world.path / "before"
    copied(world.output, before)
    for name in ("checkpoint-4", "checkpoint-6", "best"):
        shutil.rmtree(before / name)
    copied(before / "checkpoint-2" / "best", before / "best")
    if not saved_after_it:  # as where best/ is the last that was written before a kill
        for name in ("checkpoint-4", "checkpoint-6"):
            shutil.rmtree(world.output / name)
    scores[3] = 2.0
    changed = {**flags, "learning_rate": 1e-3, "allow_changes": "learning_rate"}
    assert world.run(**changed, output_dir=before, resume_from_checkpoint="last") == 0
    capsys.readouterr()
    named = world.output / "checkpoint-2"
    assert world.run(**changed, resume_from_checkpoint=named) == 0
    out = capsys.readouterr().out
    assert f"{world.output / 'best'} is again the model of step 1." in out
    assert ("renamed to NAME.old" in out) == saved_after_it
    if saved_after_it:
        assert "checkpoint-6, checkpoint-4" in out
    assert left(world.output) == left(before)
    assert weights(world.output) == weights(world.output / "checkpoint-2" / "best")


def test_what_a_resumed_run_left_is_not_gone_on_from(world, scores, monkeypatch, capsys):
    scores.update({2: 3.0, 4: 1.0, 6: 9.0})
    assert world.run(**FLAGS) == 0

    def ends(*arguments):
        raise UserError("ended at its first step")

    with monkeypatch.context() as patch:
        patch.setattr(results.Results, "log_step", ends)
        named = world.output / "checkpoint-2"
        assert world.run(**FLAGS, resume_from_checkpoint=named) == 2
    capsys.readouterr()
    assert [path.name for path in checkpoint.list_checkpoints(world.output)] == ["checkpoint-2"]
    assert {"checkpoint-4.old", "checkpoint-6.old"} <= {p.name for p in world.output.iterdir()}
    assert world.run(**FLAGS, resume_from_checkpoint="last") == 0
    assert "after step 2" in capsys.readouterr().out
    assert not list(world.output.glob("*.old"))


def test_a_best_model_of_no_step_so_far_is_set_aside(world, scores, capsys):
    scores.update({4: 9.0, 6: 1.0})
    flags = {**FLAGS, "eval_steps": 4, "load_best_model_at_end": False}
    assert world.run(**flags) == 0
    scores[4] = 0.5
    named = world.output / "checkpoint-2"
    changed = {"learning_rate": 1e-3, "allow_changes": "learning_rate"}
    assert world.run(**flags, **changed, resume_from_checkpoint=named) == 0
    assert "checkpoint-6, checkpoint-4, best." in capsys.readouterr().out
    assert weights(world.output / "best") == weights(world.output / "checkpoint-6")


def make_earlier(output):
    """As an earlier version wrote it: no sums of best/, and nothing of it in checkpoints."""
    (output / "best" / files.SUMS_FILE).unlink()
    for folder in checkpoint.list_checkpoints(output):
        path = folder / checkpoint.STATE_FILE
        times = path.stat()
        shutil.rmtree(folder / "best", ignore_errors=True)
        state = json.loads(path.read_text())
        del state["progress"]["best_steps"], state["progress"]["best_digest"]
        path.write_text(json.dumps(state))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        files.write_sums(folder, [each.name for each in folder.iterdir() if each.name[0] != "S"])


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_checkpoint_of_an_earlier_version_has_the_best_model_that_was_there_before_it(
    world, scores, capsys, is_tied
):
    scores.update({2: 9.0, 4: 3.0, 6: 1.0})
    assert world.run(**FLAGS) == 0
    whole = left(world.output)
    make_earlier(world.output)
    shutil.rmtree(world.output / "checkpoint-6")
    best = world.output / "best"
    if not is_tied:
        os.utime(best / "model.safetensors")
    assert world.run(**FLAGS, resume_from_checkpoint="last") == 0
    out = capsys.readouterr().out
    assert (f"{best} is taken as it is: a run of an earlier version" in out) == is_tied
    assert ("The best model that an earlier version wrote is gone or changed" in out) != is_tied
    found = weights(world.output)
    assert (found == weights(world.output / "checkpoint-2")) == is_tied
    assert (found == weights(world.output / "checkpoint-4")) != is_tied
    if is_tied:
        assert left(world.output)[2][best.relative_to(world.output) / "model.safetensors"] == found
        assert left(world.output)[3] == whole[3]


def test_another_set_of_validation_has_no_best_model_yet(world, scores, capsys):
    scores.update({2: 9.0, 4: 1.0, 6: 1.0})
    assert world.run(**FLAGS) == 0
    shutil.rmtree(world.output / "checkpoint-6")
    other = world.train_file
    assert world.run(**FLAGS, validation_file=other, resume_from_checkpoint="last") == 0
    assert weights(world.output) == weights(world.output / "checkpoint-4")
