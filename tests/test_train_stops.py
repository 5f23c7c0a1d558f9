"""SIGTERM, SIGINT and SIGHUP: where a run stops, what it leaves, and with which exit code."""

import os
import shutil
import signal
import time

import pytest

from kdfast.common import signals
from kdfast.evaluation import scoring
from kdfast.teachers import teacher_pass
from kdfast.training import assemble, checkpoint, results, step
from tests import forks
from tests.programs import log_of

FLAGS = {"eval_steps": 2, "max_tokens_per_micro_batch": 250}
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


def signal_at(monkeypatch, owner, name, calls, number=signal.SIGTERM, times=1):
    """Send this process a signal at call number `calls` of owner.name, counted from 1."""
    original = getattr(owner, name)
    seen = []

    def signalled(*arguments, **named):
        seen.append(name)
        if len(seen) == calls:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return original(*arguments, **named)

    monkeypatch.setattr(owner, name, signalled)


def steps_of(output):
    return [int(path.name.split("-")[1]) for path in checkpoint.list_checkpoints(output)]


@pytest.fixture(autouse=True)
def no_clock(monkeypatch):
    # Slow in fp16 on a CPU.
    monkeypatch.setattr(results, "matmul_rate", lambda device, dtype: 1e11)


@pytest.fixture
def whole(world):
    """The log of the run that nothing stops; the world is then as before it."""
    assert world.run(**FLAGS) == 0
    log = log_of(world.output)
    shutil.rmtree(world.output)
    return log


@pytest.mark.parametrize("number", CODES)
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(world, whole, monkeypatch, capsys, number):
    # Twice, as a launcher passes on what its ranks have got already.
    with monkeypatch.context() as patch:
        signal_at(patch, step, "kd_loss_rows", 8, number, times=2)
        assert world.run(**FLAGS) == CODES[number]
    (steps,) = steps_of(world.output)
    assert 0 < steps < 6 and len([line for line in log_of(world.output) if "step" in line]) == steps
    captured = capsys.readouterr()
    assert f"Stopped after step {steps}" in captured.out
    assert "--resume_from_checkpoint last goes on" in captured.err
    assert world.run(**FLAGS, resume_from_checkpoint="last") == 0
    assert log_of(world.output) == whole


def test_a_step_that_would_outlast_the_grace_is_dropped(world, whole, monkeypatch):
    stopped_after = []
    for grace in (1000, 0):
        shutil.rmtree(world.output, ignore_errors=True)
        with monkeypatch.context() as patch:
            signal_at(patch, assemble.Training, "load", 2)
            assert world.run(**FLAGS, grace_seconds=grace) == 143
        stopped_after += steps_of(world.output)
        assert log_of(world.output)[-1]["step"] == stopped_after[-1] - 1
    assert stopped_after[1] == stopped_after[0] - 1
    assert world.run(**FLAGS, resume_from_checkpoint="last") == 0
    assert log_of(world.output) == whole


def test_an_evaluation_is_cut_short_and_made_up_for(world, whole, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, scoring, "flat_positions", 1)
        assert world.run(**FLAGS) == 143
    assert steps_of(world.output) == [2]
    assert not any("evaluated_after" in line for line in log_of(world.output))
    assert world.run(**FLAGS, resume_from_checkpoint="last") == 0
    assert log_of(world.output) == whole


def test_a_signal_before_the_first_step_ends_the_teachers_pass(world, whole, monkeypatch):
    shutil.rmtree(world.path / "cache")
    with monkeypatch.context() as patch:
        signal_at(patch, teacher_pass, "_check_finite", 2)
        assert world.run(**FLAGS) == 143
    assert world.run(**FLAGS) == 0
    assert log_of(world.output) == whole


def test_a_second_signal_stops_at_once(world, monkeypatch):
    def rank(number):
        signal_at(monkeypatch, step, "kd_loss_rows", 1)
        signal_at(monkeypatch, step, "kd_loss_rows", 2)
        monkeypatch.setattr(signals, "SECONDS_OF_ONE_REQUEST", 0.0)
        forks.leave(world.run(**FLAGS))

    assert forks.exit_codes(1, rank) == [-signal.SIGTERM]
    assert steps_of(world.output) == []


@pytest.mark.parametrize("is_dropped", [False, True])
def test_ranks_stop_at_the_same_step_where_one_is_asked(world, monkeypatch, is_dropped):
    flags = {**FLAGS, "mixed_precision": "fp16" if is_dropped else "no"}

    def rank(number):
        if number == 1:
            signal_at(monkeypatch, step.StepSums, "add", 3)
            if is_dropped:
                monkeypatch.setattr(
                    signals.StopSignals, "must_drop", lambda self, *step: self.is_asked
                )
        forks.leave(world.run(**flags))

    forgotten = {"clock", "starts"}

    def end():
        states = checkpoint.read_state(world.output / "checkpoint-6")
        kept = {k: v for k, v in states["progress"].items() if k not in forgotten}
        return log_of(world.output), states["scaler"], kept

    whole_run = {**flags, "save_steps": 6}
    assert forks.exit_codes(2, lambda _: forks.leave(world.run(**whole_run))) == [0, 0]
    whole = end()
    shutil.rmtree(world.output)
    assert forks.exit_codes(2, rank) == [143, 143]
    (steps,) = steps_of(world.output)
    assert len([line for line in log_of(world.output) if "step" in line]) == steps < 6
    go_on = {**whole_run, "resume_from_checkpoint": "last"}
    assert forks.exit_codes(2, lambda _: forks.leave(world.run(**go_on))) == [0, 0]
    assert end() == whole


def test_a_clock_that_jumps_changes_nothing(world, whole, monkeypatch):
    now = time.time
    jumps = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: now() + (-1) ** next(jumps) * 10**6)
    assert world.run(**FLAGS) == 0
    assert log_of(world.output) == whole


def test_tensorboard_is_cut_back_to_the_checkpoint(world, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = {**FLAGS, "report_to": "tensorboard", "save_steps": 2}

    def shown(name="train/loss"):
        events = EventAccumulator(str(world.output / "tensorboard"))
        events.Reload()
        return [(each.step, each.value) for each in events.Scalars(name)]

    assert world.run(**flags, save_total_limit=9) == 0
    whole, evaluations = shown(), shown("eval/f1")
    for steps in (4, 6):
        shutil.rmtree(world.output / f"checkpoint-{steps}")
    assert world.run(**flags, resume_from_checkpoint="last") == 0
    assert shown() == whole
    assert [step for step, _ in whole] == list(range(6))
    assert shown("eval/f1") == evaluations
    assert [step for step, _ in evaluations] == [2, 4, 6]
