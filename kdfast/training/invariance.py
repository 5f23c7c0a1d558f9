"""Whether one step has the same gradient however it is split: over micro-batches and over ranks.

With dropout off the splits differ in the order of sums alone, so that fp64 shows the objective and
fp32 what reordering costs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from kdfast.common.errors import UserError
from kdfast.data.batches import MicroBatchPolicy, Share, TrainingOrder, shard
from kdfast.training.assemble import Training
from kdfast.training.micro_batches import MicroBatches
from kdfast.training.optimizer import ScaledAdamW
from kdfast.training.step import Callback

# Windows of the step that take part: in one piece and in fp64 they must fit into memory.
WINDOWS = 8
# Largest relative difference in fp64. A wrong count or weight changes the gradient by far more.
FP64_BOUND = 1e-10
# fp32 may be this many times as far from fp64 as the whole batch in one piece is.
FP32_FACTOR = 8.0


@dataclass(frozen=True)
class Split:
    """One way to split a step, and the gradient's distance from that of the fp64 whole.

    fp64, fp32: norm of the difference over the norm of the gradient. good: both within bounds.
    """

    name: str
    micro_batches: int
    fp64: float
    fp32: float
    good: bool


Loop = Callable[[Training, Callback, int], None]


def check(training: Training, loop: Loop, indices: np.ndarray) -> list[Split]:
    """The gradient of a step over some of the windows `indices`, split in many ways.

    The first way is the whole in one piece. This process simulates each rank in turn and shards as
    a real run does; under torchrun the simulated ranks are divided among the real ones. The model
    ends in fp64 and without dropout, `training` with another optimizer.

    Args:
        training: A run before its first step.
        loop: `kdfast.train.train_loop`.
        indices: int (n,), windows.
    """
    model, ranks = training.model, training.run.ranks
    model.eval()
    model.train = lambda mode=True: model  # type: ignore[method-assign]  # no dropout in the loop
    training.run.precision = "no"
    training.order = TrainingOrder([Share(indices[:WINDOWS])], WINDOWS, seed=0)
    lengths = training.cuts.lengths
    ways = _ways(training.cuts.policy, int(lengths[indices[:WINDOWS]].max()), ranks.count)
    found: dict[str, dict[torch.dtype, torch.Tensor]] = {name: {} for name in ways}
    counts: dict[str, int] = {}
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        training.optimizer = recorder = Recorder(model, weight_decay=0.0)
        for name, (policy, count) in ways.items():
            training.cuts = cuts = SimulatedRanks(policy, training.cuts, count)
            training.progress.steps = 0
            loop(training, Callback(), 1)
            found[name][dtype], counts[name] = recorder.gradient, cuts.micro_batches
    whole = found[next(iter(ways))]
    floor = _distance(whole[torch.float32], whole[torch.float64])
    splits = []
    for name, gradients in found.items():
        fp64 = _distance(gradients[torch.float64], whole[torch.float64])
        fp32 = _distance(gradients[torch.float32], whole[torch.float64])
        good = fp64 <= FP64_BOUND and fp32 <= FP32_FACTOR * floor
        splits.append(Split(name, counts[name], fp64, fp32, good))
    return splits


class Recorder(ScaledAdamW):
    """Keeps a step's gradient, in fp64, and changes no weight."""

    gradient: torch.Tensor

    def clip(self, max_norm: float) -> torch.Tensor:
        """Clip nothing."""
        return super().clip(math.inf)

    def step(self, rate: float, skip: torch.Tensor) -> None:
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        self.gradient = torch.cat([piece.flatten().double() for piece in pieces])
        self.zero_grad()


class SimulatedRanks(MicroBatches):
    """Cuts a step as `count` ranks do; each real rank gets the micro-batches of some of them."""

    def __init__(self, policy: MicroBatchPolicy, like: MicroBatches, count: int):
        super().__init__(policy, like.lengths, like.layout, like.run)
        self.count = count
        self.micro_batches = 0

    def cut(self, indices: np.ndarray) -> list[np.ndarray]:
        shares = [indices]
        if self.count > 1:
            shares = shard(indices, self.lengths[indices], self.count, self.policy)
        cuts = [self.policy.cut(share, self.lengths[share]) for share in shares]
        self.micro_batches = sum(map(len, cuts))
        ranks = self.run.ranks
        return [batch for cut in cuts[ranks.rank :: ranks.count] for batch in cut]

    def _smaller(self, batches: list[np.ndarray]) -> MicroBatchPolicy:
        raise UserError(
            f"--check_invariance: {WINDOWS} windows do not fit into memory in one piece: give a "
            "smaller --max_seq_length."
        )


def table(splits: list[Split]) -> str:
    """The splits as text, a line each."""
    lines = [f"{'split':<34}{'micro-batches':>14}{'fp64':>11}{'fp32':>11}"]
    for each in splits:
        mark = "" if each.good else "  differs"
        lines.append(
            f"{each.name:<34}{each.micro_batches:>14}{each.fp64:>11.1e}{each.fp32:>11.1e}{mark}"
        )
    return "\n".join(lines)


def report(training: Training, loop: Loop) -> None:
    """Say how the gradient of a step depends on how it is split. Raises UserError where it does."""
    splits = check(training, loop, training.order.step(0))
    log = training.run.ranks.log
    log("Distance of the gradient from that of one piece in fp64, over its norm; dropout is off.")
    for line in table(splits).split("\n"):
        log(line)
    wrong = [each.name for each in splits if not each.good]
    if wrong:
        raise UserError(
            f"The gradient depends on the split: see {', '.join(wrong)} above. Do not train with "
            "this model; report it with the table."
        )


def _ways(
    run_policy: MicroBatchPolicy, longest: int, real_ranks: int
) -> dict[str, tuple[MicroBatchPolicy, int]]:
    """Name -> (policy, ranks), the whole in one piece first."""
    policy = replace(run_policy, parts=None)
    ways = {"one piece": (replace(policy, parts=1), 1), "as this run cuts": (run_policy, 1)}
    for parts in (2, 3, 5):
        ways[f"{parts} equal parts"] = (replace(policy, parts=parts), 1)
    for tokens in (1, 2 * longest, 4 * longest):
        ways[f"micro-batches of {tokens} tokens"] = (replace(policy, max_tokens=tokens), 1)
    for ranks in sorted({2, 3, 4, WINDOWS + 1, real_ranks} - {1}):
        ways[f"{ranks} ranks"] = (policy, ranks)
    ways["2 ranks, 3 equal parts each"] = (replace(policy, parts=3), 2)
    return ways


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())
