"""What a run reads: student, windows, validation set, the teacher's logits.

Rank 0 prints what the user should know.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from kdfast.common.ranks import Ranks
from kdfast.common.run import Run
from kdfast.config import TrainConfig
from kdfast.data import read
from kdfast.data.examples import Example
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


def validation_sets(config: TrainConfig) -> list[suites.EvaluationSet]:
    """The sets of --validation_file, or of --validation_split, with the rules that score them.

    Raises UserError if a metric needs a language and neither the set nor a flag gives one.
    """
    data, mixture = config.data, config.mixture
    sources = data.validation_file
    languages: list[str | None] = [config.output.language or None] * len(sources)
    if len(codes := config.output.language.split(",")) == len(sources) > 1:
        languages = [*codes]
    if mixture.validation_split:
        sources = data.train_file
        given: Sequence[str | None] = mixture.train_languages or [
            config.output.language or None
        ] * len(sources)
        languages = list(given[: len(sources)])
    rules: list[str | None] = [*config.evaluation.metric] or [None]
    found = []
    for source, metric, language in zip(
        sources, rules * (len(sources) if len(rules) == 1 else 1), languages, strict=True
    ):
        each = suites.own_set(source)
        by_language = (metric or each.metric) == "mlqa" and each.language is None
        found.append(each.scored_by(metric, language if by_language else None))
    return found


def load_validation(
    config: TrainConfig, student: Loaded, ranks: Ranks
) -> scoring.ValidationSets | None:
    """The sets of --validation_file, or None without one."""
    found = []
    for source, own in zip(config.data.validation_file, validation_sets(config), strict=False):
        examples = read.read_examples(source, split="validation")
        metrics.gold_answers(examples)  # a set that cannot be scored is refused before training
        windows = prepare(config, student.tokenizer, source, "validation", ranks)
        check_student_reads(config, student, windows)
        found.append(validation_of(config, own, examples, windows, ranks))
    return scoring.ValidationSets(found) if found else None


def validation_of(
    config: TrainConfig,
    own: suites.EvaluationSet,
    examples: list[Example],
    windows: Windows,
    ranks: Ranks,
) -> scoring.Validation:
    """What is evaluated on a set."""
    if own.metric != "squad":
        ranks.log(own.rule.sentence)
    return scoring.Validation(
        windows=windows,
        examples=examples,
        max_answer_length=config.evaluation.max_answer_length,
        n_best_size=config.evaluation.n_best_size,
        rule=own.rule,
        best_by=config.evaluation.metric_for_best_model,
        name=own.source,
    )
