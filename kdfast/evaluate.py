"""`python -m kdfast.evaluate`: score a reader, or a file of predictions, as SQuAD 2.0 does."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import HfArgumentParser
from transformers.utils import logging as hf_logging

from kdfast.distill import models, scoring
from kdfast.distill.config import flag
from kdfast.distill.precision import pick_device, resolve
from kdfast.errors import UserError
from kdfast.files import make_writable, write_json
from kdfast.squad import answers, features, metrics, records


@dataclass(frozen=True)
class EvaluateConfig:
    """Give --model to answer the questions, or --predictions to score answers that are there."""

    data: str | None = flag(
        None, "SQuAD JSON, JSONL or parquet file, or a hub dataset id[:config[:split]]."
    )
    model: str | None = flag(None, "Folder or hub id of the reader.")
    predictions: str | None = flag(None, "JSON file, question id to answer, instead of --model.")
    null_odds: str | None = flag(None, "JSON file, question id to null odds, for --predictions.")
    null_threshold: float | None = flag(
        None,
        "Null odds above this mean no answer. Default: 0.0 for a model's score difference, "
        "1.0 for files, as in the official script.",
    )
    output_dir: str | None = flag(None, "Folder for metrics.json and, of a model, its answers.")
    cache_dir: str = flag("~/.cache/kdfast", "Folder for prepared features.")
    max_seq_length: int = flag(384, "Tokens in a window, special tokens included.")
    max_query_length: int = flag(64, "Tokens of the question that are kept.")
    doc_stride: int = flag(128, "Context tokens from the start of a window to that of the next.")
    max_answer_length: int = flag(30, "Tokens in the longest answer that is considered.")
    n_best_size: int = flag(20, "Answers per question in nbest_predictions.json.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(
        None, "Default: fp16 on a GPU, no on a CPU."
    )

    def check(self) -> None:
        """Raise UserError for flags that are missing, contradictory or out of range."""
        if not self.data:
            raise UserError("--data is missing: name a SQuAD file or a hub dataset.")
        if (self.model is None) == (self.predictions is None):
            raise UserError("Give either --model or --predictions, and not both.")
        if self.null_odds and self.predictions is None:
            raise UserError("--null_odds goes with --predictions: leave it out with --model.")
        if self.null_threshold is not None and math.isnan(self.null_threshold):
            raise UserError("--null_threshold is nan: give a number.")
        for name in (
            "max_seq_length",
            "max_query_length",
            "doc_stride",
            "max_answer_length",
            "n_best_size",
        ):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} is {getattr(self, name)}: give a number above 0.")


def main(argv: list[str] | None = None) -> int:
    """The program. Returns the exit status: 0, or 2 for a mistake in what it was given."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    parser = HfArgumentParser(EvaluateConfig, prog="python -m kdfast.evaluate", description=__doc__)
    config, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    try:
        evaluate(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Score, print the official figures as one JSON object, and write metrics.json."""
    config.check()
    output = open_folder(config.output_dir)
    examples = records.read_examples(config.data, split="validation")
    metrics.gold_answers(examples)  # data that cannot be scored are refused before a model runs
    if config.model is not None:
        result = answer(config, examples)
        scores = result.metrics
        if output:
            answers.write_predictions(result.answers, output)
        warn(f"{result.windows_per_second:.1f} windows/s")
    else:
        scores = score_files(config, examples)
    print(json.dumps(scores, indent=2))
    if output:
        write_json(output / "metrics.json", scores)
    return scores


def answer(config: EvaluateConfig, examples: list[records.Example]) -> scoring.Evaluation:
    """The questions answered by --model, and scored."""
    device = pick_device()
    loaded = models.load_reader(config.model, "--model")
    models.check_fits(loaded, config.max_seq_length, config.model)
    windows = features.prepare(
        config.data,
        loaded.tokenizer,
        split="validation",
        max_seq_length=config.max_seq_length,
        max_query_length=config.max_query_length,
        doc_stride=config.doc_stride,
        cache_dir=Path(config.cache_dir).expanduser(),
    )
    for note in [*loaded.notes, *windows.notes()]:
        warn(note)
    validation = scoring.Validation(
        windows=windows,
        examples=examples,
        max_answer_length=config.max_answer_length,
        n_best_size=config.n_best_size,
        null_threshold=0.0 if config.null_threshold is None else config.null_threshold,
    )
    return validation.score(
        loaded.model.to(device), device, resolve(config.mixed_precision, device)
    )


def score_files(config: EvaluateConfig, examples: list[records.Example]) -> dict[str, float]:
    """The answers of --predictions, scored."""
    found = read_object(config.predictions, "--predictions", str)
    odds = read_object(config.null_odds, "--null_odds", float) if config.null_odds else None
    gold = metrics.gold_answers(examples)
    missing, unknown = metrics.unmatched_ids(gold, found)
    if missing:
        warn(f"{len(missing)} questions without a prediction score 0, such as {missing[0]}.")
    if unknown:
        warn(f"{len(unknown)} predictions are of unknown questions, such as {unknown[0]}.")
    threshold = 1.0 if config.null_threshold is None else config.null_threshold
    return metrics.score(gold, found, odds, threshold)


def read_object(name: str, role: str, kind: type) -> dict:
    """A JSON object of question ids to values of `kind`. Raises UserError for anything else."""
    try:
        content = json.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{role} {name} cannot be read ({error.strerror}): check it.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{role} {name} is not JSON ({error}): give a JSON object.") from error
    if not isinstance(content, dict):
        raise UserError(f"{role} {name} is not a JSON object of question ids: give one.")
    for key, value in content.items():
        if kind is str:
            good, what = isinstance(value, str), "a text"
        else:
            good = type(value) in (int, float) and -1e308 < value < 1e308
            what = "a finite number"
        if not good:
            raise UserError(f"{role} {name} holds {value!r} for question {key}: give {what}.")
    return content


def open_folder(name: str | None) -> Path | None:
    """--output_dir, created and writable; None without one."""
    if name is None:
        return None
    folder = Path(name).expanduser()
    try:
        make_writable(folder)
    except OSError as error:
        raise UserError(
            f"--output_dir {folder} cannot be written ({error.strerror}): name another."
        ) from error
    return folder


def warn(text: str) -> None:
    """What is not the result goes to stderr, so that stdout is one JSON object."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
