"""A teacher's targets: how likely each of a window's tokens begins or ends the answer.

A teacher with the student's tokenizer reads the student's windows, and its logits are the
targets. One with another tokenizer reads them rewindowed, and its distributions are aligned to the
student's tokens. Rank 0 prints what the user should know.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from kdfast.common.device import place
from kdfast.common.errors import UserError
from kdfast.common.precision import AUTOCAST, resolve
from kdfast.common.progress import passing_bar
from kdfast.common.run import Run
from kdfast.config import TrainConfig
from kdfast.data.windows import Windows
from kdfast.models.hub import local_folder
from kdfast.models.inference import forward_tokens
from kdfast.models.load import check_fits, load_config, load_reader
from kdfast.models.packing import why_not_packed
from kdfast.models.structure import trained_length, without_weights
from kdfast.teachers import cache
from kdfast.teachers.alignment import Aligner, softened
from kdfast.teachers.mixture import Probabilities
from kdfast.teachers.rewindow import rewindow
from kdfast.teachers.teacher_pass import TeacherPass, fill_cache, join_shards
from kdfast.tokenizers.load import load_tokenizer
from kdfast.tokenizers.template import Template, same_tokens, tokenizer_key


@dataclass(frozen=True)
class Teacher:
    """One teacher.

    windows: what it reads, at most max_seq_length tokens each. aligner: for a tokenizer that is
    not the student's; None: the windows are the student's own.
    """

    name: str
    source: cache.Source
    windows: Windows
    max_seq_length: int
    aligner: Aligner | None = None

    def probabilities(
        self, logits: np.ndarray, student: Windows, temperature: float
    ) -> Probabilities:
        """Its softened distributions over the student's tokens. logits: own_logits."""

        def probabilities(begin: int, end: int) -> np.ndarray:
            if self.aligner is not None:
                return self.aligner.align(logits, begin, end, temperature)
            starts = student.window_start[begin : end + 1]
            return softened(logits[starts[0] : starts[-1]], starts - starts[0], temperature)

        return probabilities


class Read(NamedTuple):
    """A file, and the windows of it that the student reads."""

    source: str
    windows: Windows


def find_teacher(
    config: TrainConfig,
    name: str,
    student: Read,
    own_tokenizer: PreTrainedTokenizerFast,
    run: Run,
) -> Teacher:
    """The teacher `name` and the windows it reads, which are made where they are not there.

    The teacher has a precision of its own: what its type can.
    """
    folder = local_folder(name, "--teacher")
    own_config = load_config(folder, name, "--teacher")
    asked, ranks = config.speed.mixed_precision, run.ranks
    kind = resolve(asked, run.device, [own_config.model_type], ranks.log)
    tokenizer = load_tokenizer(folder, "--teacher")
    key = tokenizer_key(tokenizer)
    weights, windows = cache.weights_key(folder), student.windows
    if same_tokens(tokenizer, own_tokenizer):
        source = cache.Source(weights, key, windows.key, kind)
        windows = windows.with_token_types(Template.learn(tokenizer).uses_token_types)
        return Teacher(name, source, windows, config.windows.max_seq_length)
    refuse_mse(config, name)
    length = trained_length(without_weights(own_config))
    read = rewindow(
        windows,
        student.source,
        tokenizer,
        replace(config.windows, max_seq_length=length),
        cache_dir=config.data.cache_path,
        ranks=ranks,
    )
    ranks.log(
        f"{name} has another tokenizer than the student: it reads the student's {len(windows)} "
        f"windows in {len(read.windows)} of up to {length} tokens, and its distributions are "
        "aligned by characters."
    )
    if cut := read.windows.counts["truncated_questions"]:
        ranks.log(f"{cut} questions fill more than half of what {name} reads, and were cut for it.")
    templates = Template.learn(own_tokenizer), Template.learn(tokenizer)
    source = cache.Source(weights, key, read.windows.key, kind)
    return Teacher(name, source, read.windows, length, Aligner(windows, read, *templates))


def refuse_mse(config: TrainConfig, name: str) -> None:
    """Raise UserError for mse with a teacher `name` whose tokenizer is not the student's."""
    if config.loss.distillation_loss == "mse":
        raise UserError(
            f"--distillation_loss mse compares logits, and --teacher {name}, which has another "
            "tokenizer than the student, gives it probabilities only: use kl_div."
        )


def own_logits(config: TrainConfig, one: Teacher, run: Run) -> np.ndarray:
    """A teacher's raw logits over its windows, from its cache or by a pass: fp16 (tokens, 2)."""
    tokens, ranks = len(one.windows.input_ids), run.ranks
    logits = cache.open_shared(config.data.cache_path, one.source, tokens, ranks)
    if logits is not None:
        ranks.log(f"Teacher logits: cache {one.source.key} in {config.data.cache_path}.")
        return logits
    if (joined := join_shards(config.data.cache_path, one.source, one.windows, ranks)) is not None:
        ranks.log(f"Teacher logits: parts joined, cache {one.source.key}.")
        return joined
    with loaded_pass(one, run, config.speed.packing) as (teacher, progress):
        return fill_cache(config.data.cache_path, teacher, progress, ranks)


@contextmanager
def loaded_pass(
    one: Teacher, run: Run, packing: str
) -> Iterator[tuple[TeacherPass, Callable[[int], object]]]:
    """A teacher's pass, with the model on its device, and its `progress`, a bar.

    packing: the setting. `on` is `auto` for a teacher of a type that cannot pack.
    """
    loaded = load_reader(one.name, "--teacher")
    cache.check_unchanged(local_folder(one.name, "--teacher"), one.source.weights, one.name)
    check_fits(loaded, one.max_seq_length, one.name)
    for note in loaded.notes:
        run.ranks.log(note)
    device, precision = run.device, AUTOCAST[one.source.precision]
    reason = why_not_packed(loaded.model.reader.config, device, trains=False)
    if packing == "on" and reason:
        run.ranks.log(f"--packing on: {one.name} reads padded windows: {reason}.")
    packed = not reason and (packing == "on" or (packing == "auto" and device.type == "cuda"))
    model = place(loaded.model, device)
    max_tokens = forward_tokens(model, one.windows, device, precision)
    with passing_bar("teacher", "window", len(one.windows), run.ranks.is_first) as bar:
        yield TeacherPass(one.source, model, one.windows, device, max_tokens, packed), bar.update
