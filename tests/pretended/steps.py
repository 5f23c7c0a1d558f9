"""What the steps of a run did on the pretended device, micro-batch by micro-batch.

`python -m tests.pretended.steps` writes launches.json again: how many kernels a micro-batch of
each supported type launches at most. A test holds the trainer to these numbers.
"""

if __name__ == "__main__":
    from tests.pretended import build

    build.load()

import contextlib
import json
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from kdfast.models.packing import PACKS
from kdfast.training.assemble import Training
from kdfast.training.step import StepSums
from tests import published
from tests.pretended.device import pretended
from tests.programs import World

LAUNCHES = Path(__file__).with_name("launches.json")
# Types, and what --packing may be for each.
LAYOUTS = [
    (name, packing)
    for name in published.TYPES
    for packing in (("auto", "off") if name in PACKS else ("auto",))
]
# Three steps, each of several micro-batches.
FEW = {"max_steps": 3, "max_tokens_per_micro_batch": 400}


@dataclass
class Done:
    """launches, reads: as `Device` counts them, of a micro-batch."""

    launches: Counter
    reads: Counter


@dataclass
class Step:
    """micro_batches: its own, each `Done`. reads: of the whole step, these included."""

    micro_batches: list[Done] = field(default_factory=list)
    reads: Counter = field(default_factory=Counter)


@contextlib.contextmanager
def watched(device):
    """Gives a list that holds a `Step` for each attempt at a step of train.py's loop.

    A micro-batch lasts until its loss has been added, with the loader's work before it; the step
    until its numbers are in the run's hands.
    """
    steps: list[Step] = []
    make, add, finish = StepSums.__init__, StepSums.add, Training.finish_step
    marks = {}

    def mark(*names):
        for name in names:
            marks[name] = Counter(device.launches), Counter(device.reads)

    def begin(self, *args, **kwargs):
        steps.append(Step())
        mark("step")
        make(self, *args, **kwargs)
        mark("micro_batch")

    def end_of_micro_batch(self, *args, **kwargs):
        add(self, *args, **kwargs)
        launches, reads = marks["micro_batch"]
        steps[-1].micro_batches.append(Done(device.launches - launches, device.reads - reads))
        mark("micro_batch")

    def end(self, *args, **kwargs):
        report = finish(self, *args, **kwargs)
        steps[-1].reads = device.reads - marks["step"][1]
        return report

    with (
        mock.patch.object(StepSums, "__init__", begin),
        mock.patch.object(StepSums, "add", end_of_micro_batch),
        mock.patch.object(Training, "finish_step", end),
    ):
        yield steps


def run_of(folder, name, packing):
    """A short run of a reader of that type, and its steps."""
    still = {"attention_probs_dropout_prob": 0.0} if packing == "auto" else {}  # or none packs
    world = World(folder, name, **still)
    with pretended() as device, watched(device) as steps:
        assert world.run(**FEW, packing=packing) == 0
    return world, steps


def launches_of(steps):
    """Of the micro-batch that launches most."""
    return max(sum(done.launches.values()) for step in steps for done in step.micro_batches)


def record():
    """Write launches.json."""
    most = {}
    for name, packing in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            _, steps = run_of(Path(folder), name, packing)
        most.setdefault(name, {})[packing] = launches_of(steps)
    LAUNCHES.write_text(json.dumps(most, indent=2) + "\n")


if __name__ == "__main__":
    record()
