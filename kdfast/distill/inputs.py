"""What a run reads: student, windows, validation set, the teacher's logits.

What a user should hear is said by rank 0.
"""

import numpy as np
import torch
from tqdm import tqdm

from kdfast.distill import costs, models, scoring, teacher
from kdfast.distill.config import TrainConfig
from kdfast.distill.precision import teacher_precision
from kdfast.distill.ranks import Ranks
from kdfast.errors import UserError
from kdfast.squad import features, metrics, records


def load_student(config: TrainConfig, ranks: Ranks) -> models.Loaded:
    """The student of --student, or the teacher, cut down to --student_layers where given."""
    name = config.student or config.teacher
    role = "--student" if config.student else "--teacher"
    student = models.load_reader(
        name, role, new_head_seed=config.seed, embeds_dropout_prob=config.embeds_dropout_prob
    )
    layers = config.kept_layers()
    if layers is not None:
        models.keep_layers(student, layers, name)
    models.check_fits(student, config.max_seq_length, name)
    for note in student.notes:
        ranks.say(note)
    return student


def prepare(
    config: TrainConfig, student: models.Loaded, source: str, split: str, ranks: Ranks
) -> features.Windows:
    """The windows of a data source, from the cache where they are there; says what was found."""
    windows = features.prepare(
        source,
        student.tokenizer,
        split=split,
        max_seq_length=config.max_seq_length,
        max_query_length=config.max_query_length,
        doc_stride=config.doc_stride,
        cache_dir=config.cache_path,
    )
    for note in windows.notes():
        ranks.say(note)
    return windows


def teacher_source(
    config: TrainConfig,
    windows: features.Windows,
    student: models.Loaded,
    device: torch.device,
    precision: str,
    ranks: Ranks,
) -> teacher.Source | None:
    """What determines the teacher's logits; None where they have no weight."""
    if config.distillation_loss_weight == 0:
        if config.teacher is not None:
            ranks.say("--distillation_loss_weight is 0: the teacher's logits are not computed.")
        return None
    folder = models.local_folder(config.teacher, "--teacher")
    key = features.tokenizer_key(models.load_tokenizer(folder, "--teacher"))
    if key != features.tokenizer_key(student.tokenizer):
        raise UserError(
            f"--teacher {config.teacher} and the student {config.student} have different "
            "tokenizers, so their logits stand on different tokens: use models that share one."
        )
    kind = teacher_precision(precision, device)
    return teacher.Source(teacher.weights_key(folder), key, windows.key, kind)


def teacher_logits(
    config: TrainConfig,
    source: teacher.Source | None,
    windows: features.Windows,
    device: torch.device,
    ranks: Ranks,
) -> np.ndarray | None:
    """The teacher's logits of `source`; the teacher is loaded only where the cache lacks them."""
    if source is None:
        return None
    tokens = len(windows.input_ids)
    cached = ranks.is_first and teacher.open_cache(config.cache_path, source, tokens) is not None
    if ranks.share(str(cached)) == "True":
        ranks.say(f"Teacher logits: cache {source.key} in {config.cache_path}.")
        return teacher.open_cache(config.cache_path, source, tokens, verify=False)
    loaded = models.load_reader(config.teacher, "--teacher")
    models.check_fits(loaded, config.max_seq_length, config.teacher)
    for note in loaded.notes:
        ranks.say(note)
    total = len(windows.lengths)
    with tqdm(total=total, desc="teacher", unit="window", disable=not ranks.is_first) as bar:
        return teacher.fill_cache(
            config.cache_path,
            source,
            loaded.model.to(device),
            windows,
            device,
            costs.forward_tokens(device),
            bar.update,
            ranks,
        )


def trained_windows(config: TrainConfig, windows: features.Windows, ranks: Ranks) -> np.ndarray:
    """The windows that teach something: unlabelled ones only where there is a teacher."""
    keep = np.array(windows.trainable)
    unlabelled = windows.start_positions == -100
    if config.distillation_loss_weight == 0 and unlabelled.any():
        ranks.say(
            f"{(keep & unlabelled).sum()} unlabelled windows are left out: there is no teacher."
        )
        keep &= ~unlabelled
    if not keep.any():
        raise UserError(
            f"--train_file {config.train_file} has no question to train on: give labelled "
            "questions, or a --teacher for unlabelled ones."
        )
    return np.flatnonzero(keep)


def load_validation(
    config: TrainConfig, student: models.Loaded, ranks: Ranks
) -> scoring.Validation | None:
    """The set of --validation_file, or None without one."""
    if config.validation_file is None:
        return None
    examples = records.read_examples(config.validation_file, split="validation")
    metrics.gold_answers(examples)  # a set that cannot be scored is refused before training
    return scoring.Validation(
        windows=prepare(config, student, config.validation_file, "validation", ranks),
        examples=examples,
        max_answer_length=config.max_answer_length,
        n_best_size=config.n_best_size,
    )
