"""--stage both: a run that learns layers, then one that learns predictions and starts from it."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kdfast.common.errors import UserError
from kdfast.common.files import read_json_object
from kdfast.common.flag_values import LARGEST
from kdfast.common.ranks import Ranks
from kdfast.config import TrainConfig
from kdfast.data import read
from kdfast.evaluation import metrics
from kdfast.models import load
from kdfast.models.save import RUN_FILE
from kdfast.teachers import targets
from kdfast.tokenizers.load import load_tokenizer
from kdfast.tokenizers.template import same_tokens
from kdfast.train_flags import of_stage
from kdfast.training.checkpoint import list_checkpoints
from kdfast.training.log import LOG_FILE
from kdfast.training.run_folder import check_no_links, open_output, remove_run, sole_run


def of_layers(config: TrainConfig) -> TrainConfig:
    """The settings of stage layers within --stage both.

    It always ends in a checkpoint, from which a resumed run sees by content that it is the same.
    """
    settings = of_stage(_given(config), "layers")
    teacher = config.layers_teacher or config.teacher[0]
    settings |= {
        "teacher": [teacher],
        "student": config.student or config.teacher[0],
        "output_dir": str(Path(config.output_dir) / "layers"),
        "save_steps": config.save_steps or LARGEST,
    }
    return TrainConfig(**settings)


def of_predictions(config: TrainConfig) -> TrainConfig:
    """The settings of stage predictions within --stage both: the student is that of the other."""
    output = Path(config.output_dir)
    settings = of_stage(_given(config), "predictions")
    settings |= {
        "student": str(output / "layers"),
        "student_layers": None,
        "output_dir": str(output / "predictions"),
    }
    return TrainConfig(**settings)


def _given(config: TrainConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if value is not None}


@contextmanager
def held(config: TrainConfig, ranks: Ranks) -> Iterator[list[TrainConfig]]:
    """The runs of --stage both in their order, as rank 0 finds them; their folder is held for them.

    A finished one is among them: it is compared with its data and models, and ends. Raises
    UserError for a folder that a run may not write, and for data or a teacher that is not there.
    """
    told, output = "", Path(config.output_dir).expanduser()
    with ExitStack() as stack:
        if ranks.is_first:
            goes_on = config.resume_from_checkpoint is not None or ranks.restarts > 0
            runs = [of_layers(config), of_predictions(config)]
            if goes_on:
                runs = _continued(*runs, may_begin=ranks.restarts > 0)
            check_no_links(output)
            for each in runs:
                open_output(each)
            stack.enter_context(sole_run(output, ranks))
            _look_ahead(*runs)
            if goes_on and runs[-1].overwrite:
                remove_run(_folder(runs[-1]))  # a rank that starts anew shall not go on from it
            told = json.dumps([asdict(each) for each in runs])
        yield [TrainConfig(**each) for each in json.loads(ranks.share(told))]


def earlier(config: TrainConfig) -> dict[str, Any] | None:
    """Settings of the run of stage layers that the student comes from, or None: the student is
    the folder of such a run."""
    if config.student is None:
        return None
    found = read_json_object(Path(config.student).expanduser() / RUN_FILE).get("config")
    try:
        before = TrainConfig(**found)
        before.check()
    except (TypeError, UserError):  # of no run, or of another version
        return None
    return found if before.stage == "layers" else None


def _continued(first: TrainConfig, last: TrainConfig, may_begin: bool) -> list[TrainConfig]:
    """Both runs, each from where it stands: its last checkpoint, or anew.

    may_begin: whether nothing at all may be there yet.
    """
    first_is_done = (_folder(first) / RUN_FILE).is_file()
    had_begun = (_folder(first) / LOG_FILE).is_file()
    if list_checkpoints(_folder(first)) or not (had_begun or may_begin):
        first = replace(first, resume_from_checkpoint="last", overwrite=False)
    else:
        first = replace(first, resume_from_checkpoint=None, overwrite=had_begun)
    # What is in there while the first is not done is left of a run that --overwrite replaces.
    is_done = (_folder(last) / RUN_FILE).is_file()
    had_begun = (_folder(last) / LOG_FILE).is_file()
    if first_is_done and (is_done or list_checkpoints(_folder(last))):
        last = replace(last, resume_from_checkpoint="last", overwrite=False)
    else:
        last = replace(last, resume_from_checkpoint=None, overwrite=had_begun)
    return [first, last]


def _folder(run: TrainConfig) -> Path:
    return Path(run.output_dir).expanduser()


def _look_ahead(first: TrainConfig, last: TrainConfig) -> None:
    """Raise UserError for what would end the last run as soon as the first has taken its time."""
    if last.train_file != first.train_file:
        read.read_examples(last.train_file, split="train")
    if last.validation_file:
        metrics.gold_answers(read.read_examples(last.validation_file, split="validation"))
    if not last.learns_answers:
        return
    own = load_tokenizer(load.local_folder(first.student, "--student"), "--student")
    for name in last.teacher:
        loaded = load.load_reader(name, "--teacher")
        if not same_tokens(loaded.tokenizer, own):
            targets.refuse_mse(last, name)
        else:
            load.check_fits(loaded, last.max_seq_length, name)
