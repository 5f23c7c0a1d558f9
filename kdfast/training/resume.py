"""Going on with a run: from which checkpoint, and whether it is the same run still."""

from pathlib import Path
from typing import Any

import torch

from kdfast.common.errors import UserError
from kdfast.common.machine import code_key
from kdfast.common.ranks import Ranks
from kdfast.config import CHANGEABLE, CUTS, FIXED_ON_RESUME, TrainConfig
from kdfast.data.windows import Windows
from kdfast.models.hub import local_folder
from kdfast.models.load import Loaded
from kdfast.models.save import mend_model
from kdfast.models.span_model import SpanModel
from kdfast.teachers import cache
from kdfast.tokenizers.template import tokenizer_key
from kdfast.training import checkpoint
from kdfast.training.assemble import Restored
from kdfast.training.optimizer import ScaledAdamW


def restarted(config: TrainConfig, output: Path, ranks: Ranks) -> TrainConfig:
    """The settings after torchrun has started the ranks again: go on from the last checkpoint."""
    if ranks.restarts == 0:
        return config
    if checkpoint.list_checkpoints(output):
        return config.replace(resume_from_checkpoint="last", overwrite=False)
    return config.replace(resume_from_checkpoint=None, overwrite=True)


class Resumed:
    """The checkpoint that a run goes on from, and the changes of settings that it brings."""

    def __init__(self, folder: Path, config: TrainConfig):
        self.folder = folder
        # A setting that checkpoints of earlier versions lack comes first.
        self.identity = {"packing": "auto", **checkpoint.read_state(folder)["identity"]}
        self.allowed = config.output.allowed_changes()
        self.changed: list[str] = []

    @classmethod
    def find(cls, config: TrainConfig, output: Path, ranks: Ranks) -> "Resumed | None":
        """What --resume_from_checkpoint names, or None without it.

        Raises UserError where there is no whole checkpoint. Rank 0 looks for it, and mends what a
        kill has left in the folder.
        """
        folder = ""
        if config.output.resume_from_checkpoint and ranks.is_first:
            found, notes = checkpoint.find_checkpoint(config.output.resume_from_checkpoint, output)
            for name in ("best", "last"):
                mend_model(output / name)
            checkpoint.remove_leftovers(output)
            for note in notes:
                ranks.log(note)
            folder = str(found)
        folder = ranks.share(folder)
        return cls(Path(folder), config) if folder else None

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

    def restore(
        self, output: Path, validation: str | None, model: SpanModel, optimizer: ScaledAdamW
    ) -> Restored:
        """Load the checkpoint. validation: key of the set that this run evaluates on, if any."""
        progress, policy = checkpoint.load_checkpoint(self.folder, model, optimizer)
        is_kept = validation == progress.validation and (output / "best").is_dir()
        if validation is not None and not is_kept:  # figures of different sets do not compare
            progress.best_f1 = None
            progress.evaluated = min(progress.evaluated, progress.steps - 1)
        return Restored(progress, None if CUTS.intersection(self.changed) else policy)

    def notes(self, environment: dict[str, Any], steps: int) -> list[str]:
        """What a user should hear: where the run stands, and what is not as it was."""
        lines = [f"Resumed from {self.folder} after step {steps}."]
        if self.changed:
            lines.append(f"Changed, as allowed: {', '.join(self.changed)}.")
        before = self.identity["circumstances"]
        other = [name for name, value in environment.items() if before.get(name) != value]
        if other:
            lines.append(f"Not as before: {', '.join(other)}; so not to the same bits.")
        return lines


def settings_of(config: TrainConfig, precision: str) -> dict[str, Any]:
    """The settings that decide what a run learns, as a checkpoint's identity holds them."""
    values = config.flat()
    return {**{name: values[name] for name in FIXED_ON_RESUME}, "mixed_precision": precision}


def keys_of(
    config: TrainConfig,
    student: Loaded,
    windows: Windows,
    teachers: list[str] | None,
    logits: str | None,
) -> dict[str, Any]:
    """What a run learns from, by content: a file or model under another name is the same.

    teachers: weights_key of each. logits: key of the cache of what they say.
    """
    role = "--student" if config.model.student else "--teacher"
    folder = local_folder(config.model.student_source, role)
    return {
        "student": cache.weights_key(folder),
        "teacher": teachers,
        "tokenizer": tokenizer_key(student.tokenizer),
        "training data": windows.key,
        "teacher's logits": logits,
    }


def environment_of(ranks: Ranks) -> dict[str, Any]:
    """What may differ between starts; results then differ by rounding."""
    return {
        "number of ranks": ranks.count,
        "version of torch": torch.__version__,
        "version of kdfast": code_key(),
    }
