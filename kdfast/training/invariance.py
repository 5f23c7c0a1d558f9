"""Whether one step has the same gradient however it is split: over micro-batches and over ranks.

With dropout off the splits differ in the order of sums alone, so that fp64 shows the objective and
fp32 what reordering costs.
"""

from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from kdfast.common.errors import UserError
from kdfast.common.ranks import Ranks
from kdfast.data.batches import MicroBatchPolicy, shard
from kdfast.training.step import Stepper

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


def check(stepper: Stepper, indices: np.ndarray) -> list[Split]:
    """The gradient of a step over some of the windows `indices`, split in many ways.

    The first way is the whole in one piece. Ranks are played in turn by this process, with the
    dealing of a real run; under torchrun the real ones share that play, and share the step once as
    they are. The model ends in fp32 and with dropout off, the stepper without autocast and scaler.
    """
    stepper.model.eval()
    stepper.autocast = stepper.updater.scaler = None
    indices = indices[:WINDOWS]
    lengths = stepper.lengths[indices]
    ways = _ways(stepper, int(lengths.max()))
    found: dict[str, dict[torch.dtype, torch.Tensor]] = {name: {} for name in ways}
    counts: dict[str, int] = {}
    for dtype in (torch.float64, torch.float32):
        stepper.forward.to(dtype)
        for name, (policy, ranks) in ways.items():
            shares = shard(indices, lengths, ranks, policy) if ranks > 1 else [indices]
            cuts = [policy.cut(share, stepper.lengths[share]) for share in shares]
            counts[name] = sum(map(len, cuts))
            mine = cuts[stepper.ranks.rank :: stepper.ranks.count]
            found[name][dtype] = _gradient(stepper, mine, len(indices))
    whole = found[next(iter(ways))]
    floor = _distance(whole[torch.float32], whole[torch.float64])
    splits = []
    for name, gradients in found.items():
        fp64 = _distance(gradients[torch.float64], whole[torch.float64])
        fp32 = _distance(gradients[torch.float32], whole[torch.float64])
        good = fp64 <= FP64_BOUND and fp32 <= FP32_FACTOR * floor
        splits.append(Split(name, counts[name], fp64, fp32, good))
    return splits


def table(splits: list[Split]) -> str:
    """The splits as text, a line each."""
    lines = [f"{'split':<34}{'micro-batches':>14}{'fp64':>11}{'fp32':>11}"]
    for each in splits:
        mark = "" if each.good else "  differs"
        lines.append(
            f"{each.name:<34}{each.micro_batches:>14}{each.fp64:>11.1e}{each.fp32:>11.1e}{mark}"
        )
    return "\n".join(lines)


def report(stepper: Stepper, indices: np.ndarray, ranks: Ranks) -> dict:
    """Say how the gradient of a step depends on how it is split. Raises UserError where it does."""
    splits = check(stepper, indices)
    ranks.log(
        "Distance of the gradient from that of one piece in fp64, over its norm; dropout is off."
    )
    ranks.log(table(splits))
    wrong = [each.name for each in splits if not each.good]
    if wrong:
        raise UserError(
            f"The gradient depends on the split: see {', '.join(wrong)} above. Do not train with "
            "this model; report it with the table."
        )
    return {"splits": [asdict(each) for each in splits]}


def _ways(stepper: Stepper, longest: int) -> dict[str, tuple[MicroBatchPolicy, int]]:
    """Name -> (policy, ranks), the whole in one piece first."""
    policy = replace(stepper.policy, parts=None)
    ways = {"one piece": (replace(policy, parts=1), 1), "as this run cuts": (stepper.policy, 1)}
    for parts in (2, 3, 5):
        ways[f"{parts} equal parts"] = (replace(policy, parts=parts), 1)
    for tokens in (1, 2 * longest, 4 * longest):
        ways[f"micro-batches of {tokens} tokens"] = (replace(policy, max_tokens=tokens), 1)
    for ranks in sorted({2, 3, 4, WINDOWS + 1, stepper.ranks.count} - {1}):
        ways[f"{ranks} ranks"] = (policy, ranks)
    ways["2 ranks, 3 equal parts each"] = (replace(policy, parts=3), 2)
    return ways


def _gradient(stepper: Stepper, cuts: list[list[np.ndarray]], count: int) -> torch.Tensor:
    """The whole gradient in fp64, of a step of `count` windows whose ranks cut it so."""
    stepper.updater.drop()
    for batches in cuts:
        stepper.accumulate(0, batches, count)
    parameters = stepper.updater.parameters
    stepper.ranks.sum_gradients(parameters, torch.zeros(1, device=stepper.device))
    pieces = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    gradient = torch.cat([piece.flatten().double() for piece in pieces])
    stepper.updater.drop()
    return gradient


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())
