"""Runs that are killed at random instants, go on, and end with the bits of one that never was."""

import functools
import json
import random
import shutil
import time
from dataclasses import replace

import pytest
import torch

from kdfast.config import LossSettings
from kdfast.teachers import teacher_pass
from kdfast.training import assemble, results
from kdfast.training.checkpoint import list_checkpoints
from kdfast.training.step import span_objective
from tests import forks, instants
from tests.conftest import KILLS
from tests.programs import log_of

FLAGS = {
    "max_steps": 6,
    "save_steps": 2,
    "eval_steps": 3,
    "max_tokens_per_micro_batch": 250,
    "load_best_model_at_end": True,
}
SHARE = 3  # a start is killed within the first third of what a whole run does, if it gets so far


class Run:
    """Starts of one run, killed or not, with `count` ranks."""

    def __init__(self, world, count, precision):
        self.world, self.count = world, count
        self.flags = {**FLAGS, "mixed_precision": precision}

    def start(self, killer=None, victim=0):
        """The processes of a start; the one of rank `victim` counts instants with `killer`."""
        output = self.world.output
        flags = dict(self.flags)
        if list_checkpoints(output):
            flags["resume_from_checkpoint"] = "last"
        elif (output / "train_log.jsonl").exists():
            flags["overwrite"] = True

        def rank(number):
            if killer is not None and number == victim:
                instants.watch((str(output), flags_cache), killer)
            status = self.world.run(**flags)
            if killer is not None and killer.last is None and number == victim:
                (self.world.path / "instants").write_text(str(len(killer.seen)))
            forks.leave(status)

        flags_cache = str(self.world.path / "cache")
        processes, _, self.keeper = forks.start(self.count, rank)
        return processes

    def end(self, processes):
        """The exit codes. Ranks that outlive another learn of it, or are killed as by torchrun."""
        codes = {}
        while len(codes) < len(processes):
            if any(codes.values()):
                for process in processes:
                    process.join(5)
                    process.kill()
            for number, process in enumerate(processes):
                process.join(0.01)
                if process.exitcode is not None:
                    codes[number] = process.exitcode
        self.keeper.kill()
        return list(codes.values())

    def found(self):
        """All that two equal runs share."""
        output = self.world.output
        last = output / f"checkpoint-{FLAGS['max_steps']}"
        state = json.loads((last / "trainer_state.json").read_text())
        for name in ("clock", "starts"):
            del state["progress"][name]
        record = json.loads((output / "run.json").read_text())
        files = [last / "model.safetensors", last / "optimizer.safetensors"]
        folders = [output, output / "best", output / "last", last / "best"]
        files += [folder / "model.safetensors" for folder in folders]
        return {
            "state": state,
            "log": log_of(output),
            "metrics": record["metrics"],
            **{str(path.relative_to(output)): path.read_bytes() for path in files},
        }

    def clear(self):
        shutil.rmtree(self.world.output)
        shutil.rmtree(self.world.path / "cache")


@pytest.mark.parametrize("precision", ["no", "fp16"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_run_ends_with_the_bits_of_a_whole_one(world, monkeypatch, long, count, precision):
    # So that the scaler's state matters: it grows until steps overflow.
    objective = replace(span_objective(LossSettings()), initial_scale=2.0**14)
    monkeypatch.setattr(assemble, "span_objective", lambda settings: objective)
    scaler = functools.partial(torch.amp.GradScaler, growth_interval=2)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    monkeypatch.setattr(teacher_pass, "SECONDS_BETWEEN_SAVES", 0.0)
    # Slow in fp16 on a CPU.
    monkeypatch.setattr(results, "matmul_rate", lambda device, dtype: 1e11)
    run = Run(world, count, precision)
    started = time.monotonic()
    assert run.end(run.start(instants.Killer())) == [0] * count
    seconds = (time.monotonic() - started) / SHARE
    number = int((world.path / "instants").read_text()) // SHARE
    whole = run.found()
    run.clear()

    draw = random.Random(f"{count} {precision}")
    killed = 0
    while killed < KILLS[long] // 4:
        victim = draw.randrange(count)
        if killed % 2:  # wherever it is by then
            processes = run.start()
            time.sleep(draw.uniform(0, seconds))
            processes[victim].kill()
        else:
            processes = run.start(instants.Killer(draw.randrange(number)), victim)
        if any(run.end(processes)):
            killed += 1
        else:
            assert run.found() == whole
            run.clear()
    assert run.end(run.start()) == [0] * count
    assert run.found() == whole
