"""What a run reads: student, windows, validation set, the teacher's logits.

What a user should hear is said by rank 0.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kdfast.common.errors import UserError
from kdfast.common.progress import reading_bar
from kdfast.common.ranks import Ranks
from kdfast.config import TrainConfig
from kdfast.data import read, tally
from kdfast.data.prepare import prepare_windows
from kdfast.data.windows import Windows, WindowSettings
from kdfast.evaluation import metrics, scoring, suites
from kdfast.models import load
from kdfast.models.checks import check_windows
from kdfast.models.precision import teacher_precision
from kdfast.teachers import cache, targets
from kdfast.teachers import mixture as derived


@dataclass(frozen=True)
class TeacherTargets:
    """The teachers of a run, and what determines the logits that the student learns from."""

    teachers: list[targets.Teacher]
    source: cache.Source | derived.Mixture

    @property
    def key(self) -> str:
        """The key of the cache with those logits."""
        return self.source.key

    @property
    def is_derived(self) -> bool:
        """Whether the logits are made of the teachers' distributions at the run's temperature."""
        return isinstance(self.source, derived.Mixture)

    @property
    def weights(self) -> list[str]:
        """Each teacher's weights_key."""
        return [each.source.weights for each in self.teachers]


def load_student(config: TrainConfig, ranks: Ranks) -> load.Loaded:
    """The student of --student, or the teacher, cut down to --student_layers where given."""
    name = config.student or config.teacher[0]
    role = "--student" if config.student else "--teacher"
    student = load.load_reader(
        name, role, new_head_seed=config.seed, embeds_dropout_prob=config.embeds_dropout_prob
    )
    layers = config.kept_layers()
    if layers is not None:
        load.keep_layers(student, layers, name)
    load.check_fits(student, config.max_seq_length, name)
    for note in student.notes:
        ranks.log(note)
    return student


def prepare(
    config: TrainConfig, student: load.Loaded, source: str, split: str, ranks: Ranks
) -> Windows:
    """The windows of a data source, from the cache where they are there; says what was found."""
    windows = prepare_windows(
        source,
        student.tokenizer,
        WindowSettings(config.max_seq_length, config.max_query_length, config.doc_stride),
        split=split,
        cache_dir=config.cache_path,
        progress=reading_bar(source),
    )
    if student.model is not None:
        check_windows(student.model.reader, windows, config.max_seq_length, config.cache_path)
    for note in windows.notes(training=split == "train"):
        ranks.log(note)
    return windows


def find_targets(
    config: TrainConfig,
    windows: Windows,
    student: load.Loaded,
    device: torch.device,
    precision: str,
    ranks: Ranks,
) -> TeacherTargets | None:
    """Whose logits the student learns from; None where they have no weight."""
    if not config.learns_answers:
        if config.teacher and config.stage == "predictions":
            ranks.log("--distillation_loss_weight is 0: the teacher's logits are not computed.")
        return None
    kind = teacher_precision(precision, device)
    found = [targets.find(config, name, windows, student, kind, ranks) for name in config.teacher]
    if len(found) == 1 and found[0].aligner is None:
        return TeacherTargets(found, found[0].source)
    mixture = derived.Mixture(
        windows=windows.key,
        temperature=config.temperature,
        weights=config.teacher_weights or [1 / len(found)] * len(found),
        sources=[each.source.key for each in found],
    )
    return TeacherTargets(found, mixture)


def teacher_logits(
    config: TrainConfig,
    taught: TeacherTargets | None,
    windows: Windows,
    device: torch.device,
    ranks: Ranks,
) -> np.ndarray | None:
    """The logits of `taught`, from its cache, which is made where it is not there.

    Those of one teacher with the student's tokenizer as they are, else a derived cache. A teacher
    is loaded only where its own logits are not there.
    """
    if taught is None:
        return None
    if not taught.is_derived:
        return targets.own_logits(config, taught.teachers[0], device, ranks)
    mixture = taught.source
    logits = cache.open_shared(config.cache_path, mixture, len(windows.input_ids), ranks)
    if logits is None:
        shares = [
            each.probabilities(
                targets.own_logits(config, each, device, ranks), windows, config.temperature
            )
            for each in taught.teachers
        ]
        logits = derived.fill_cache(config.cache_path, mixture, windows, shares, ranks)
    ranks.log(f"Teacher distributions: cache {mixture.key} in {config.cache_path}.")
    return logits


def trained_windows(config: TrainConfig, windows: Windows, ranks: Ranks) -> np.ndarray:
    """The windows that teach something: unlabelled ones only where there is a teacher."""
    keep = np.array(windows.trainable)
    unlabelled = keep & (windows.start_positions == -100)
    is_useless = config.stage == "predictions" and not config.learns_answers and unlabelled.any()
    if is_useless:
        count = unlabelled.sum()
        ranks.log(f"{count} unlabelled windows are left out, as no teacher is learnt from.")
        keep &= ~unlabelled
    if not keep.any():
        remedy = "all are left out, as said above: mend the file or the flags"
        if is_useless:
            needed = "--distillation_loss_weight above 0" if config.teacher else "--teacher"
            remedy = f"give labelled questions, or a {needed} for unlabelled ones"
        raise UserError(f"--train_file {config.train_file} has no question to train on: {remedy}.")
    return np.flatnonzero(keep)


def validation_set(config: TrainConfig) -> suites.EvaluationSet | None:
    """The set of --validation_file with the rule that scores it, or None without one.

    Raises UserError for a rule that lacks a language; that of --language, unless the set has one.
    """
    if config.validation_file is None:
        return None
    found = suites.own_set(config.validation_file)
    by_language = (config.metric or found.metric) == "mlqa" and found.language is None
    return found.scored_by(config.metric, config.language if by_language else None)


def question_counts(windows: Windows, chosen: np.ndarray) -> dict[str, Any]:
    """What run.json holds of the training questions: read, trained, left_out by reason.

    chosen: the windows that are trained on.
    """
    trained = len(np.unique(windows.question[chosen]))
    reasons = (*tally.UNREAD, *tally.UNTRAINED)
    left_out = {reason: windows.counts[reason] for reason in reasons if windows.counts[reason]}
    if rest := windows.tally.read() - trained - sum(left_out.values()):
        left_out["unlabelled"] = rest
    return {"read": windows.tally.read(), "trained": trained, "left_out": left_out}


def load_validation(
    config: TrainConfig, student: load.Loaded, ranks: Ranks
) -> scoring.Validation | None:
    """The set of --validation_file, or None without one."""
    found = validation_set(config)
    if found is None:
        return None
    if found.metric != "squad":
        ranks.log(found.rule.sentence)
    examples = read.read_examples(config.validation_file, split="validation")
    metrics.gold_answers(examples)  # a set that cannot be scored is refused before training
    return scoring.Validation(
        windows=prepare(config, student, config.validation_file, "validation", ranks),
        examples=examples,
        max_answer_length=config.max_answer_length,
        n_best_size=config.n_best_size,
        rule=found.rule,
    )
