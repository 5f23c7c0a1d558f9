"""`python -m kdfast.replay OUTPUT/fault-STEP`: run a step again that was not finite.

The folder is what kdfast.train leaves at such a step. Prints for each window which term is not
finite, and exits with 1 if any is, with 0 if all are finite here.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kdfast import program

if TYPE_CHECKING:
    from kdfast.distill import faults


def main(argv: list[str] | None = None) -> int:
    """The program; see `program.run` for the exit status it returns, or 1: it is not finite."""
    return program.run(parse, start, argv)


def parse(argv: list[str]) -> argparse.Namespace:
    """The settings that a command line gives. Raises UserError for unknown flags and values."""
    parser = program.plain_parser("replay", __doc__)
    parser.add_argument("folder", help="A fault-STEP folder in the --output_dir of a run.")
    parser.add_argument(
        "--mixed_precision", choices=("bf16", "fp16", "no"), help="Default: that of the run."
    )
    return program.parse(parser, argv)


def start(given: argparse.Namespace) -> int:
    """The work of the program: 1 where a term is not finite, else 0."""
    return 1 if replay(Path(given.folder).expanduser(), given.mixed_precision) else 0


def replay(folder: Path, mixed_precision: str | None = None) -> "list[faults.Finding]":
    """Run the folder's micro-batches again, print and return what is not finite in them."""
    import numpy as np

    from kdfast.distill import fault_folder, faults, layers, models
    from kdfast.distill.dropout import speed_up_dropout
    from kdfast.distill.optim import Updater, make_optimizer
    from kdfast.distill.precision import pick_device, resolve
    from kdfast.distill.ranks import Ranks
    from kdfast.squad.batches import CutRule

    kept = fault_folder.read(folder)
    device = pick_device()
    precision = resolve(mixed_precision or kept.precision, device)
    loaded = models.load_reader(
        str(folder), "The folder", embeds_dropout_prob=kept.config.embeds_dropout_prob
    )
    fault_folder.check_fits(kept, loaded, folder)
    model = loaded.model.to(device)
    if device.type == "cpu" and not kept.config.torch_compile:  # as the run did
        speed_up_dropout(model)
    feed = fault_folder.KeptFeed(kept.batches, device)
    learner, kind_of_step = layers.make_learner(kept.config, model, device, precision)
    updater = Updater(learner, make_optimizer(learner, 0.0), None, kept.config.max_grad_norm)
    fault_folder.restore_beside(kept, model, updater, folder)
    stepper = kind_of_step(
        kept.config,
        model,
        learner,
        updater,
        feed,
        np.zeros(0, dtype=np.int32),  # nothing is cut here
        CutRule(1, 0.0, 0.0, 0.0),
        device,
        precision,
        total_steps=1,
        ranks=Ranks(kept.rank),
    )
    print(
        f"Step {kept.step}, rank {kept.rank}: {sum(map(len, kept.cuts))} windows in "
        f"{len(kept.cuts)} micro-batches, on {device}, precision {precision}."
    )
    scale = kept.loss_scale if precision == "fp16" else None
    findings, _ = faults.examine(stepper, kept.step, scale, kept.cuts, kept.count)
    for each in findings:
        print(f"Not finite is {each.term}{f' ({each.detail})' if each.detail else ''}, in")
        for window in each.windows:
            print(f"  window {window}, question {kept.questions.get(window, 'without an id')}")
    print("The fault is here too." if findings else "All is finite here.")
    return findings


if __name__ == "__main__":
    sys.exit(main())
