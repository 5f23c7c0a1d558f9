"""Going on with a run: from which checkpoint, and whether it is the same run still."""

import json
from pathlib import Path
from typing import Any

import torch

from kdfast.common import launch
from kdfast.common.errors import UserError
from kdfast.common.files import SUMS_FILE, listed
from kdfast.common.machine import changes, code_key, numeric_environment
from kdfast.common.ranks import Ranks
from kdfast.common.run import Run
from kdfast.config import CHANGEABLE, CUTS, FIXED_ON_RESUME, TrainConfig
from kdfast.models.checks import MODEL_FILE
from kdfast.models.hub import local_folder
from kdfast.models.load import Loaded
from kdfast.models.save import fault_of_model, link_model, list_checkpoints, set_aside, steps_of
from kdfast.models.span_model import SpanModel
from kdfast.teachers import cache
from kdfast.tokenizers.template import tokenizer_key
from kdfast.training import checkpoint
from kdfast.training.assemble import Progress, Restored
from kdfast.training.optimizer import ScaledAdamW
from kdfast.training.run_folder import remove_run

HASHES = (
    "version of kdfast",
    "bits of the teacher's logits",
)  # entries of environment_of that say nothing to a user


def restarted(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """The settings after torchrun has started the ranks again: go on from the last checkpoint.

    Only from one of this launch. What was in the folder before it is to be kept, replaced or gone
    on from as the flags say, also where the first start has died or was refused. Rank 0 calls it.
    """
    output = config.output.folder
    began = launch.recall(str(output.resolve())) if ranks.restarts else None
    if began is None:
        return config
    if any(steps_of(path) > int(began) for path in list_checkpoints(output)):
        return config.replace(resume_from_checkpoint="last", overwrite=False)
    return config.replace(overwrite=not config.output.resume_from_checkpoint)


def begin(config: TrainConfig, steps: int) -> None:
    """Make the output folder this launch's, before the run writes there. Rank 0 calls it, once all
    that the run needs has proved good. steps: those of the checkpoint that it goes on from."""
    output = config.output.folder
    if config.output.overwrite:
        remove_run(output)
    launch.remember(str(output.resolve()), str(steps))


class Resumed:
    """The checkpoint that a run goes on from, and the changes of settings that it brings.

    best: the folder of its best model, see find_best.
    """

    def __init__(self, folder: Path, best: Path | None, config: TrainConfig):
        self.folder = folder
        self.best = best
        # A setting that checkpoints of earlier versions lack comes first.
        self.identity = {"packing": "auto", **checkpoint.read_state(folder)["identity"]}
        self.allowed = config.allowed_changes()
        self.changed: list[str] = []

    @classmethod
    def find(cls, config: TrainConfig, output: Path, ranks: Ranks) -> "Resumed | None":
        """What --resume_from_checkpoint names, or None without it.

        Raises UserError where there is no whole checkpoint. Rank 0 looks for it, and deletes what
        a kill has left in the folder.
        """
        folder = best = ""
        if config.output.resume_from_checkpoint and ranks.is_first:
            found, notes = checkpoint.find_checkpoint(config.output.resume_from_checkpoint, output)
            model, note = find_best(found, output)
            checkpoint.remove_leftovers(output)
            for line in [*notes, note] if note else notes:
                ranks.log(line)
            folder, best = str(found), str(model or "")
        folder, best = json.loads(ranks.share(json.dumps([folder, best])))
        return cls(Path(folder), Path(best) if best else None, config) if folder else None

    def check(self, identity: dict[str, Any]) -> None:
        """Raise UserError, saying what differs, where `identity` is not the checkpoint's and may
        not change. Only the keys in `identity` are compared."""
        different = [name for name in identity if identity[name] != self.identity.get(name)]
        refused = [name for name in different if name not in self.allowed]
        self.changed += [name for name in different if name in self.allowed]
        if not refused:
            return
        told = ", ".join(self._told(name, identity[name]) for name in refused)
        remedy = "Start with the same settings and data, or start again in another --output_dir."
        if free := [name for name in refused if name in CHANGEABLE]:
            names = ",".join([*sorted(self.allowed), *free])
            remedy = f"Give --allow_changes {names} if that is meant. {remedy}"
        raise UserError(
            f"--resume_from_checkpoint {self.folder} belongs to another run; these differ: {told}. "
            f"{remedy}"
        )

    def _told(self, name: str, value: Any) -> str:
        """A setting with both values; of data and models, whose keys say nothing, the name."""
        return f"{name} ({self.identity.get(name)} -> {value})" if name in FIXED_ON_RESUME else name

    def restore(self, validation: str | None, model: SpanModel, optimizer: ScaledAdamW) -> Restored:
        """Load the checkpoint. validation: key of the set that this run evaluates on, if any."""
        progress, policy = checkpoint.load_checkpoint(self.folder, model, optimizer)
        if validation not in (None, progress.validation):
            self.best = None  # figures of different sets do not compare
        if self.best is None:
            progress.best_f1 = progress.best_exact = None
            progress.best_steps = progress.best_digest = None
            progress.patience_counter = 0
            if validation is not None:
                progress.evaluated = min(progress.evaluated, progress.steps - 1)
        return Restored(progress, None if CUTS.intersection(self.changed) else policy)

    def set_aside_others(self, output: Path, progress: Progress) -> list[str]:
        """Leave in `output` what belongs to the run's steps so far; returns lines for the user.

        Later checkpoints are renamed, the latest first: should a kill come between them, those that
        are left are of one line of steps. best/ is again what it was at the checkpoint.
        """
        later = [path for path in list_checkpoints(output) if steps_of(path) > progress.steps]
        others = [*reversed(later)]
        best = output / checkpoint.BEST
        lines = []
        if self.best:
            is_other = progress.best_digest and fault_of_model(best, progress.best_digest)
            progress.best_digest = link_model(self.best, best)
            if is_other:
                lines = [f"{best} is again the model of step {progress.best_steps}."]
        elif best.exists():
            others.append(best)
        for path in others:
            set_aside(path)
        if others:
            names = ", ".join(path.name for path in others)
            lines.append(
                f"Not of the run's first {progress.steps} steps, and renamed to NAME.old until the "
                f"next checkpoint: {names}."
            )
        return lines

    def notes(self, environment: dict[str, Any], steps: int) -> list[str]:
        """What a user should hear: where the run stands, and what is not as it was."""
        lines = [f"Resumed from {self.folder} after step {steps}."]
        if self.changed:
            lines.append(f"Changed, as allowed: {', '.join(self.changed)}.")
        if other := changes(self.identity.get("circumstances", {}), environment, HASHES):
            lines.append(f"Not as before: {', '.join(other)}; so not to the same bits.")
        return lines


def find_best(folder: Path, output_dir: Path) -> tuple[Path | None, str | None]:
    """Where the best model of checkpoint `folder`, which is whole, is, and what a user should hear.

    None: there was no evaluation before it, or no model that is surely the one of its steps.
    """
    progress = checkpoint.read_state(folder)["progress"]
    if progress["best_f1"] is None:
        return None, None
    digest, best = progress.get("best_digest"), output_dir / checkpoint.BEST
    if digest and (folder / checkpoint.BEST).is_dir():
        return folder / checkpoint.BEST, None
    if digest and fault_of_model(best, digest) is None:
        return best, f"{folder / checkpoint.BEST} is gone: {best} has the same sums and is used."
    if not digest and _written_before(best, folder):
        return best, f"{best} is taken as it is: a run of an earlier version kept no sums of it."
    which = f"of step {progress['best_steps']}" if digest else "that an earlier version wrote"
    return None, (
        f"The best model {which} is gone or changed: its f1 of {progress['best_f1']:.2f} is "
        "forgotten, and the best model is that of the evaluations to come."
    )


def _written_before(model: Path, saved: Path) -> bool:
    """Whether no later step than the checkpoint's can have written the model."""
    times = [path.stat().st_mtime for path in listed(model) if path.name != SUMS_FILE]
    written = (saved / checkpoint.STATE_FILE).stat().st_mtime
    return (model / MODEL_FILE).is_file() and max(times) <= written


def settings_of(config: TrainConfig, precision: str) -> dict[str, Any]:
    """The settings that decide what a run learns, as a checkpoint's identity holds them."""
    values = config.flat()
    return {**{name: values[name] for name in FIXED_ON_RESUME}, "mixed_precision": precision}


def keys_of(
    config: TrainConfig,
    student: Loaded,
    data: Any,
    teachers: list[str] | None,
    logits: Any,
) -> dict[str, Any]:
    """What a run learns from, by content: a file or model under another name is the same.

    data: TrainFiles.key. teachers: weights_key of each. logits: Targets.key.
    """
    role = "--student" if config.model.student else "--teacher"
    folder = local_folder(config.model.student_source, role)
    return {
        "student": cache.weights_key(folder),
        "teacher": teachers,
        "tokenizer": tokenizer_key(student.tokenizer),
        "training data": data,
        "teacher's logits": logits,
    }


def environment_of(run: Run, logits: Any) -> dict[str, Any]:
    """What may differ between starts; results then differ by rounding. All ranks call it.

    logits: sum, or sums, of what the teacher says, which may have been computed again elsewhere.
    """
    return {
        "number of ranks": run.ranks.count,
        "version of torch": torch.__version__,
        "version of kdfast": code_key(),
        **numeric_environment(run.device, run.ranks),
        "bits of the teacher's logits": logits,
    }
