"""--stage both: a run that learns layers, then one that learns predictions and starts from it."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kdfast.common.files import read_record
from kdfast.common.folders import check_no_links
from kdfast.common.forms import record
from kdfast.common.ranks import Ranks
from kdfast.common.settings import LARGEST
from kdfast.config import SETTINGS, TrainConfig
from kdfast.config_checks import check, of_stage
from kdfast.data import read
from kdfast.evaluation import metrics
from kdfast.models.hub import local_folder
from kdfast.models.load import check_fits, load_reader
from kdfast.models.save import RUN_FILE
from kdfast.teachers import targets
from kdfast.tokenizers.load import load_tokenizer
from kdfast.tokenizers.template import same_tokens
from kdfast.training.checkpoint import list_checkpoints
from kdfast.training.log import LOG_FILE
from kdfast.training.resume import restarted
from kdfast.training.run_folder import open_output, remove_run, sole_run


def of_layers(config: TrainConfig) -> TrainConfig:
    """The settings of stage layers within --stage both.

    It always ends in a checkpoint, from which a resumed run sees by content that it is the same.
    """
    model, output = config.model, config.output
    settings = of_stage(config.given(), "layers")
    settings |= {
        "teacher": [model.layers_teacher or model.teacher[0]],
        "student": model.student_source,
        "output_dir": str(Path(output.output_dir) / "layers"),
        "save_steps": output.save_steps or LARGEST,
    }
    return TrainConfig(**settings)


def of_predictions(config: TrainConfig) -> TrainConfig:
    """The settings of stage predictions within --stage both: the student is that of the other."""
    output = Path(config.output.output_dir)
    settings = of_stage(config.given(), "predictions")
    settings |= {
        "student": str(output / "layers"),
        "student_layers": None,
        "output_dir": str(output / "predictions"),
    }
    return TrainConfig(**settings)


@contextmanager
def held(config: TrainConfig, ranks: Ranks) -> Iterator[list[TrainConfig]]:
    """The runs of --stage both in their order, as rank 0 finds them; their folder is held for them.

    A finished stage is among them: its data and models are checked, and it trains no more. Raises
    UserError for a folder that a run may not write, and for data or a teacher that is not there.
    """
    shared, output = "", config.output.folder
    with ExitStack() as stack:
        if ranks.is_first:
            goes_on = config.output.resume_from_checkpoint
            runs = [of_layers(config), of_predictions(config)]
            if goes_on:
                runs = _continued(*runs)
            runs = [restarted(each, ranks) for each in runs]
            check_no_links(output, "--output_dir")
            for each in runs:
                check(each)
                open_output(each)
            stack.enter_context(sole_run(output, ranks))
            _look_ahead(*runs)
            if goes_on and runs[-1].output.overwrite:
                # Who starts again once the first stage is done must not go on from it.
                remove_run(runs[-1].output.folder)
            shared = json.dumps([each.flat() for each in runs])
        yield [TrainConfig(**each) for each in json.loads(ranks.share(shared))]


def earlier(config: TrainConfig) -> dict[str, Any] | None:
    """Settings of the run of stage layers that the student comes from, or None: the student is
    the folder of such a run."""
    if not config.model.student:
        return None
    form = record({"config": record({})}, "config")
    run = read_record(Path(config.model.student).expanduser() / RUN_FILE, form)
    found = run.get("config", {})
    try:  # without the settings of other versions
        before = TrainConfig(**{k: v for k, v in found.items() if k in SETTINGS})
        check(before)
    except (TypeError, AttributeError, ValueError):  # of no run, or of another version
        return None
    return found if before.model.stage == "layers" else None


def _continued(first: TrainConfig, last: TrainConfig) -> list[TrainConfig]:
    """Both runs, each from where it stands: its last checkpoint, or from the start."""
    first_is_done = (first.output.folder / RUN_FILE).is_file()
    had_begun = (first.output.folder / LOG_FILE).is_file()
    if list_checkpoints(first.output.folder) or not had_begun:
        first = first.replace(resume_from_checkpoint="last", overwrite=False)
    else:
        first = first.replace(resume_from_checkpoint=None, overwrite=had_begun)
    # What is in there while the first is not done is left of a run that --overwrite replaces.
    is_done = (last.output.folder / RUN_FILE).is_file()
    had_begun = (last.output.folder / LOG_FILE).is_file()
    if first_is_done and (is_done or list_checkpoints(last.output.folder)):
        last = last.replace(resume_from_checkpoint="last", overwrite=False)
    else:
        last = last.replace(resume_from_checkpoint=None, overwrite=had_begun)
    return [first, last]


def _look_ahead(first: TrainConfig, last: TrainConfig) -> None:
    """Raise UserError for what the second stage would fail at, before the first one trains."""
    for each in last.data.train_file + last.data.unlabelled_file:
        if each not in first.data.train_file + first.data.unlabelled_file:
            read.read_examples(each, split="train")
    for each in last.data.validation_file:
        metrics.gold_answers(read.read_examples(each, split="validation"))
    if not last.learns_answers:
        return
    own = load_tokenizer(local_folder(first.model.student, "--student"), "--student")
    for name in last.model.teacher:
        loaded = load_reader(name, "--teacher")
        if not same_tokens(loaded.tokenizer, own):
            targets.refuse_mse(last, name)
        else:
            check_fits(loaded, last.windows.max_seq_length, name)
