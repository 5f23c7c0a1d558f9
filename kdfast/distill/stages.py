"""--stage both: a run that learns layers, then one that learns predictions and starts from it."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kdfast.distill import models
from kdfast.distill.checkpoint import list_checkpoints
from kdfast.distill.config import OBJECTIVE, TrainConfig
from kdfast.distill.config_checks import LAYERS_FLAGS
from kdfast.distill.log import LOG_FILE
from kdfast.distill.ranks import Ranks
from kdfast.distill.record import RUN_FILE, open_output
from kdfast.errors import UserError
from kdfast.files import read_json_object
from kdfast.squad import metrics, records

# What only a reader that answers has a use for.
OF_ANSWERS = {
    "validation_file": None,
    "eval_steps": None,
    "load_best_model_at_end": False,
    "report": False,
    "push_to_hub": None,
}


def of_layers(config: TrainConfig) -> TrainConfig:
    """The settings of stage layers within --stage both."""
    own = {
        flag: getattr(config, special)
        for special, flag in LAYERS_FLAGS.items()
        if getattr(config, special) is not None
    }
    own["teacher"] = [config.layers_teacher or config.teacher[0]]
    return replace(
        config,
        stage="layers",
        student=config.student or config.teacher[0],
        output_dir=str(Path(config.output_dir) / "layers"),
        teacher_weights=None,
        **dict.fromkeys(LAYERS_FLAGS),
        **OF_ANSWERS,
        **own,
    )


def of_predictions(config: TrainConfig) -> TrainConfig:
    """The settings of stage predictions within --stage both: the student is that of the other."""
    output = Path(config.output_dir)
    return replace(
        config,
        stage="predictions",
        student=str(output / "layers"),
        student_layers=None,
        output_dir=str(output / "predictions"),
        attention_loss="none",
        **dict.fromkeys(LAYERS_FLAGS),
    )


def to_do(config: TrainConfig, ranks: Ranks) -> list[TrainConfig]:
    """The runs that --stage both still has to make, in their order, as rank 0 finds them.

    Raises UserError for a folder that a run may not write, for data or a teacher of the last run
    that is not there, and where a finished stage layers had other settings than these.
    """
    told = ""
    if ranks.is_first:
        runs = [of_layers(config), of_predictions(config)]
        if config.resume_from_checkpoint or ranks.restarts:
            runs = [_continued(each) for each in runs]
            if _is_finished(runs[0]):
                _check_same(runs.pop(0))
                ranks.say("Stage layers is finished.")
        for each in runs:
            open_output(each)
        if len(runs) > 1:
            _look_ahead(*runs)
        told = json.dumps([asdict(each) for each in runs])
    return [TrainConfig(**each) for each in json.loads(ranks.share(told))]


def earlier(config: TrainConfig) -> dict[str, Any] | None:
    """Settings of the run of stage layers that the student comes from, or None: the student is
    the folder of such a run."""
    if config.student is None:
        return None
    found = read_json_object(Path(config.student).expanduser() / RUN_FILE).get("config")
    return found if isinstance(found, dict) and found.get("stage") == "layers" else None


def _look_ahead(first: TrainConfig, last: TrainConfig) -> None:
    """Raise UserError for what would end the last run as soon as the first has taken its time."""
    for name in last.teacher or ():
        folder = models.local_folder(name, "--teacher")
        models.load_config(folder, name, "--teacher")
        models.load_tokenizer(folder, "--teacher")
    if last.train_file != first.train_file:
        records.read_examples(last.train_file, split="train")
    if last.validation_file:
        metrics.gold_answers(records.read_examples(last.validation_file, split="validation"))


def _continued(run: TrainConfig) -> TrainConfig:
    """Its settings if it goes on where it stands: from a checkpoint, anew before the first."""
    output = Path(run.output_dir).expanduser()
    if list_checkpoints(output) or _is_finished(run):
        return replace(run, resume_from_checkpoint="last", overwrite=False)
    had_begun = (output / LOG_FILE).is_file()
    return replace(run, resume_from_checkpoint=None, overwrite=had_begun)


def _is_finished(run: TrainConfig) -> bool:
    return (Path(run.output_dir).expanduser() / RUN_FILE).is_file()


def _check_same(run: TrainConfig) -> None:
    """Raise UserError unless the finished run in its folder had these settings."""
    output = Path(run.output_dir).expanduser()
    before, now = read_json_object(output / RUN_FILE).get("config", {}), asdict(run)
    names = {"teacher", "student", "train_file", *OBJECTIVE} - run.allowed_changes()
    if different := sorted(name for name in names if before.get(name) != now[name]):
        told = ", ".join(f"{name} ({before.get(name)} -> {now[name]})" for name in different)
        raise UserError(
            f"--resume_from_checkpoint last: stage layers in {output} was made with other "
            f"settings: {told}. Start with the same, or anew in another --output_dir."
        )
