"""What a run reads: student, windows, validation set, the teacher's logits.

Rank 0 prints what the user should know.
"""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from kdfast.common.ranks import Ranks
from kdfast.common.run import Run
from kdfast.config import TrainConfig
from kdfast.data import read
from kdfast.data.prepare import prepare_windows
from kdfast.data.windows import Windows
from kdfast.evaluation import metrics, scoring, suites
from kdfast.models.checks import check_windows
from kdfast.models.hub import local_folder
from kdfast.models.load import Loaded, check_fits, keep_layers, load_config, load_reader
from kdfast.teachers import cache, targets
from kdfast.teachers.mixture import Mixture, fill_cache


@dataclass(frozen=True)
class TeacherTargets:
    """The teachers of a run, and what determines the logits that the student learns from."""

    teachers: list[targets.Teacher]
    source: cache.Source | Mixture

    @property
    def key(self) -> str:
        """The key of the cache with those logits."""
        return self.source.key

    @property
    def is_derived(self) -> bool:
        """Whether the logits are made of the teachers' distributions at the run's temperature."""
        return isinstance(self.source, Mixture)

    @property
    def weights(self) -> list[str]:
        """Each teacher's weights_key."""
        return [each.source.weights for each in self.teachers]


def trained_types(config: TrainConfig) -> list[str]:
    """Types of the models that compute in one step: the student and, in stage layers, the teacher.

    Raises UserError for models that are not there or not supported.
    """
    names = [("--student" if config.model.student else "--teacher", config.model.student_source)]
    if config.model.stage == "layers":
        names.append(("--teacher", config.model.teacher[0]))
    return [load_config(local_folder(name, role), name, role).model_type for role, name in names]


def load_student(config: TrainConfig, ranks: Ranks) -> Loaded:
    """The student of --student, or the teacher, cut down to --student_layers where given."""
    name = config.model.student_source
    role = "--student" if config.model.student else "--teacher"
    student = load_reader(
        name,
        role,
        new_head_seed=config.optimization.seed,
        embeds_dropout_prob=config.optimization.embeds_dropout_prob,
    )
    layers = config.model.kept_layers()
    if layers is not None:
        keep_layers(student, layers, name)
    check_fits(student, config.windows.max_seq_length, name)
    for note in student.notes:
        ranks.log(note)
    return student


def prepare(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerFast,
    source: str,
    split: str,
    ranks: Ranks,
    labelled: bool = True,
) -> Windows:
    """The windows of a data source, from the cache where they are there; logs what was found.

    labelled: False ignores all answers; the features in the cache are the same.
    """
    windows = prepare_windows(
        source,
        tokenizer,
        config.windows,
        split=split,
        cache_dir=config.data.cache_path,
        ranks=ranks,
    )
    data, trains = config.data, split == "train"
    several = trains and len(data.train_file) + len(data.unlabelled_file) > 1
    for note in windows.notes(training=trains and labelled):
        ranks.log(f"{source}: {note}" if several else note)
    return windows if labelled else windows.without_labels()


def check_student_reads(config: TrainConfig, student: Loaded, windows: Windows) -> None:
    """Raise UserError for windows that the student cannot read."""
    longest = config.windows.max_seq_length
    check_windows(student.model.reader, windows, longest, config.data.cache_path)


def find_targets(
    config: TrainConfig,
    source: str,
    windows: Windows,
    tokenizer: PreTrainedTokenizerFast,
    run: Run,
) -> TeacherTargets:
    """The teachers whose logits the student learns from.

    source: the file. windows, tokenizer: the student's.
    """
    found = [
        targets.find_teacher(config, name, targets.Read(source, windows), tokenizer, run)
        for name in config.model.teacher
    ]
    if len(found) == 1 and found[0].aligner is None:
        return TeacherTargets(found, found[0].source)
    mixture = Mixture(
        windows=windows.key,
        temperature=config.loss.temperature,
        weights=config.model.teacher_weights or [1 / len(found)] * len(found),
        sources=[each.source.key for each in found],
    )
    return TeacherTargets(found, mixture)


def teacher_logits(
    config: TrainConfig, taught: TeacherTargets, windows: Windows, run: Run
) -> np.ndarray:
    """The logits of `taught`, from its cache, which is made where it is not there.

    Those of one teacher with the student's tokenizer as they are, else a derived cache. A teacher
    is loaded only where its own logits are not there.
    """
    mixture = taught.source
    if not isinstance(mixture, Mixture):
        return targets.own_logits(config, taught.teachers[0], run)
    logits = cache.open_shared(config.data.cache_path, mixture, len(windows.input_ids), run.ranks)
    if logits is None:
        shares = [
            each.probabilities(
                targets.own_logits(config, each, run), windows, config.loss.temperature
            )
            for each in taught.teachers
        ]
        logits = fill_cache(config.data.cache_path, mixture, windows, shares, run.ranks)
    run.ranks.log(f"Teacher distributions: cache {mixture.key} in {config.data.cache_path}.")
    return logits


def validation_set(config: TrainConfig) -> suites.EvaluationSet | None:
    """The set of --validation_file with the rule that scores it, or None without one.

    Raises UserError if the metric needs a language and neither the set nor --language gives one.
    """
    if not config.data.validation_file:
        return None
    found = suites.own_set(config.data.validation_file)
    by_language = (config.evaluation.metric or found.metric) == "mlqa" and found.language is None
    return found.scored_by(
        config.evaluation.metric, config.output.language or None if by_language else None
    )


def load_validation(
    config: TrainConfig, student: Loaded, ranks: Ranks
) -> scoring.Validation | None:
    """The set of --validation_file, or None without one."""
    found = validation_set(config)
    if found is None:
        return None
    if found.metric != "squad":
        ranks.log(found.rule.sentence)
    examples = read.read_examples(config.data.validation_file, split="validation")
    metrics.gold_answers(examples)  # a set that cannot be scored is refused before training
    windows = prepare(config, student.tokenizer, config.data.validation_file, "validation", ranks)
    check_student_reads(config, student, windows)
    return scoring.Validation(
        windows=windows,
        examples=examples,
        max_answer_length=config.evaluation.max_answer_length,
        n_best_size=config.evaluation.n_best_size,
        rule=found.rule,
        best_by=config.evaluation.metric_for_best_model,
    )
