"""`python -m kdfast.prepare`: features and teacher logits, for kdfast.train to find in its cache.

Several processes can share the work as parts of an array job, see docs/clusters.md; the caches have
the same bytes as those of one process.
"""

import sys

from kdfast.command_line import parse_prepare
from kdfast.common import program

if __name__ == "__main__":  # flags come first: what is imported below takes seconds
    sys.exit(program.run(parse_prepare, "kdfast.prepare:start"))

from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from kdfast.command_line import PrepareConfig
from kdfast.common.device import pick_device
from kdfast.common.errors import UserError
from kdfast.common.ranks import Ranks
from kdfast.common.run import Run
from kdfast.common.settings import check_values
from kdfast.config import TrainConfig
from kdfast.data.cache import cache_folder
from kdfast.data.chunks import ChunkFolder, Shard, parse_shard
from kdfast.data.features import Features
from kdfast.data.prepare import prepare_shard
from kdfast.data.windows import Windows
from kdfast.models.hub import local_folder
from kdfast.teachers import cache, targets
from kdfast.teachers.teacher_pass import fill_shard, join_shards, missing_shards
from kdfast.tokenizers.load import load_tokenizer
from kdfast.training import inputs
from kdfast.training.run_folder import check_shared


class Preparation(NamedTuple):
    """What a process prepares. shard: None for all of it, as far as it is not there."""

    config: TrainConfig
    run: Run
    tokenizer: PreTrainedTokenizerFast
    shard: Shard | None
    joins: bool


def start(settings: PrepareConfig) -> None:
    """The work of the program."""
    program.refuse_windows("prepare")
    for group in settings:
        check_values(group)
    config, own = settings.for_training(), settings.own
    if not config.model.student and not config.model.teacher:
        raise UserError("--student is missing: name the model whose tokenizer makes the features.")
    if not config.data.train_file and (own.teacher or not config.data.validation_file):
        raise UserError("--train_file is missing: name what is to be prepared.")
    if own.shard and own.join:
        raise UserError("--shard and --join exclude each other: give one of them.")
    shard = parse_shard(own.shard) if own.shard else None
    with Ranks.join() as ranks:
        ranks.assert_same_on_all_ranks({"settings": settings})
        check_shared(config.data.cache_path, ranks, "--cache_dir")
        role = "--student" if config.model.student else "--teacher"
        name = config.model.student_source
        tokenizer = load_tokenizer(local_folder(name, role), role)
        run = Run(pick_device(ranks.local_rank), ranks=ranks)
        prepare(Preparation(config, run, tokenizer, shard, own.join))


def prepare(wanted: Preparation) -> None:
    """Features, and the teachers' passes where there are teachers."""
    config, run = wanted.config, wanted.run
    sources = config.data.train_file + config.data.unlabelled_file
    read = [(each, prepare_features(wanted, each, "train")) for each in sources]
    for each in config.data.validation_file:
        prepare_features(wanted, each, "validation")
    for name in config.model.teacher:
        for source, windows in read:
            assert windows is not None
            student = targets.Read(source, windows)
            one = targets.find_teacher(config, name, student, wanted.tokenizer, run)
            prepare_pass(wanted, one)


def prepare_features(wanted: Preparation, source: str, split: str) -> Windows | None:
    """The features of a source; None where this was a part of them, and others are missing.

    Raises UserError where they are needed, and parts of them are missing.
    """
    config, ranks, shard = wanted.config, wanted.run.ranks, wanted.shard
    cache_dir = config.data.cache_path
    features = Features.of(source, wanted.tokenizer, config.windows, split)
    folder = cache_folder(cache_dir, features.key)
    if wanted.joins or (shard and config.model.teacher):
        missing = ChunkFolder.of(folder).missing_shards()
        if not folder.is_dir() and missing != []:
            raise UserError(
                f"The features of {source} with these settings lack {_parts(missing)}: make them "
                "with --shard and without --teacher."
            )
        shard = None
    windows: Windows | None
    if shard:
        windows = prepare_shard(cache_dir, features, shard, ranks)
        ranks.log(f"Features of {source}: part {shard} is there.")
        for note in windows.notes(training=split == "train") if windows else ():
            ranks.log(note)
    else:
        windows = inputs.prepare(config, wanted.tokenizer, source, split, ranks)
    if windows is not None:
        ranks.log(f"Features of {source}: all are in {folder}.")
    return windows


def prepare_pass(wanted: Preparation, teacher: targets.Teacher) -> None:
    """A teacher's pass, or a part of it.

    Raises UserError where parts are to be joined, and some are missing.
    """
    ranks, shard, source = wanted.run.ranks, wanted.shard, teacher.source
    windows, cache_dir = teacher.windows, wanted.config.data.cache_path
    tokens = len(windows.input_ids)
    if cache.open_shared(cache_dir, source, tokens, ranks) is None:
        if shard:
            packing = wanted.config.speed.packing
            with targets.loaded_pass(teacher, wanted.run, packing) as (loaded, progress):
                fill_shard(cache_dir, loaded, shard, progress, ranks)
            ranks.log(f"Logits of {teacher.name}: part {shard} is there.")
            if join_shards(cache_dir, source, windows, ranks) is None:
                return
        elif wanted.joins:
            missing = missing_shards(cache_dir, source, windows)
            if join_shards(cache_dir, source, windows, ranks) is None:
                raise UserError(
                    f"The logits of {teacher.name} with these settings and --mixed_precision "
                    f"{source.precision} lack {_parts(missing)}: make them with --shard, or give "
                    "the settings that they were made with."
                )
        else:
            targets.own_logits(wanted.config, teacher, wanted.run)
    folder = cache_dir / "teacher" / source.key
    ranks.log(f"Logits of {teacher.name}: all are in {folder}.")


def _parts(missing: list[str] | None) -> str:
    """The parts that are missing, in a message. None: all."""
    if missing is None:
        return "all parts"
    return f"{'part' if len(missing) == 1 else 'parts'} {', '.join(missing)}"


def main(argv: list[str] | None = None) -> int:
    """The program, called from Python; see `program.run` for the exit status it returns."""
    return program.run(parse_prepare, "kdfast.prepare:start", argv)
