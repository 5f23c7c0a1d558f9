"""`python -m kdfast.evaluate`: score a reader, or a file of predictions, as SQuAD 2.0 does."""

import sys

from kdfast.common import program
from kdfast.evaluation.settings import parse

if __name__ == "__main__":  # flags come first: what is imported below takes seconds
    sys.exit(program.run(parse, "kdfast.evaluate:start", stdout_is_result=True))

import json
import math
from pathlib import Path

from kdfast.common.errors import UserError
from kdfast.common.files import make_writable, write_json
from kdfast.common.machine import describe_machine
from kdfast.common.precision import pick_device, resolve
from kdfast.common.ranks import Ranks
from kdfast.data import read
from kdfast.data.tally import Tally
from kdfast.evaluation import answers, bootstrap, metrics, predictions, scoring, tables
from kdfast.evaluation.evaluated_model import Contender, questions_of, result_of
from kdfast.evaluation.settings import EvaluateConfig
from kdfast.evaluation.suites import EvaluationSet

FORMAT = 1  # of what is written: raise it when the meaning changes


def start(config: EvaluateConfig) -> None:
    """The work of the program."""
    with Ranks.join() as ranks:
        if printed := evaluate(config, ranks):
            print(printed)


def evaluate(config: EvaluateConfig, ranks: Ranks) -> str:
    """Score, and write what --output_dir is for, which the first of the ranks does.

    Returns what the program prints, "" for another rank: of one --data the official figures as one
    JSON object, of a --suite a table.
    """
    config.check()
    sets = config.sets()
    output = open_folder(config.output_dir)
    if config.predictions is not None:
        scores = score_files(config, sets[0], ranks)
        return report_scores(scores, sets[0], output) if ranks.is_first else ""

    device = pick_device(ranks.local_rank)
    precision = resolve(config.mixed_precision, device)
    named = [("--model", config.model)]
    if config.compare is not None:
        named.append(("--compare", config.compare))
    readers = [Contender(config, name, role, device, precision, ranks) for role, name in named]
    ranks.assert_same_on_all_ranks(
        {"settings": config, "weights": [reader.weights for reader in readers]}
    )
    questions = {each.name: read_questions(each) for each in sets}
    thresholds = [reader.null_threshold() for reader in readers]
    about = [reader.describe(sets[0].source) for reader in readers]
    header = {
        "format": FORMAT,
        "model": about[0],
        "compared_with": about[1] if len(about) > 1 else None,
        "settings": {
            **readers[0].windows,
            "max_answer_length": config.max_answer_length,
            "precision": precision,
            "null_threshold_from": config.null_threshold_from,
        },
        "bootstrap": {
            "resamples": bootstrap.RESAMPLES,
            "level": bootstrap.LEVEL,
            "seed": bootstrap.SEED,
        },
        "ranks": ranks.count,
        **describe_machine(device),
    }
    found = []
    for each in sets:
        asked = questions.pop(each.name)
        answered = [
            reader.answer(each, asked, threshold if each.unanswerable else math.inf)
            for reader, threshold in zip(readers, thresholds, strict=True)
        ]
        if not ranks.is_first:
            continue
        found.append(result_of(each, answered))
        speed = found[-1]["windows_per_second"]
        by = f"  {each.rule.sentence}" if each.metric != "squad" else ""
        line = scoring.line(found[-1]["metrics"])
        ranks.warn(f"{each.name}: {line}  {speed:.1f} windows/s{by}")
        if output:
            write_json(output / f"{each.name}.eval.json", header | found[-1])
            write_json(output / f"{each.name}.questions.json", questions_of(answered))
    if not ranks.is_first:
        return ""
    if output:
        write_json(output / "summary.json", header | {"sets": found})
        if config.suite is None:
            answers.write_predictions(answered[0].evaluation.answers, output)
    if config.suite is not None:
        return tables.table(found)
    if config.compare is not None:
        ranks.warn(tables.table(found))
    return report_scores(found[0]["metrics"], sets[0], output)


def report_scores(scores: dict[str, float], each: EvaluationSet, output: Path | None) -> str:
    """The official figures and the rule's name as JSON, which also goes into metrics.json."""
    named = each.rule.named() | scores
    if output:
        write_json(output / "metrics.json", named)
    return json.dumps(named, indent=2)


def read_questions(each: EvaluationSet, tally: Tally | None = None) -> list[read.Example]:
    """The questions of a set. What cannot be read or scored is refused before a reader answers."""
    try:
        examples = read.read_examples(each.source, split="validation", tally=tally)
        read.check_ids(each.source, examples)
        metrics.gold_answers(examples)
    except UserError as error:
        if each.file is not None:
            raise
        raise UserError(
            f"Set {each.name}: {error}. --data {each.name}=FILE takes a copy."
        ) from None
    return examples


def score_files(config: EvaluateConfig, each: EvaluationSet, ranks: Ranks) -> dict[str, float]:
    """The answers of --predictions to the questions of a set, scored by its rule."""
    tally = Tally()
    examples = read_questions(each, tally)
    for note in tally.notes({}, training=False):
        ranks.warn(note)
    gold = metrics.gold_answers(examples)
    found = predictions.read_values(config.predictions, "--predictions", str)
    found = predictions.for_examples(found, examples)
    odds = None
    if config.null_odds:
        odds = predictions.read_values(config.null_odds, "--null_odds", float)
        odds = predictions.for_examples(odds, examples)
    missing, unknown = metrics.unmatched_ids(gold, found)
    if missing:
        ranks.warn(f"{len(missing)} questions without a prediction score 0, such as {missing[0]}.")
    if unknown:
        ranks.warn(f"{len(unknown)} predictions are of unknown questions, such as {unknown[0]}.")
    threshold = 1.0 if config.null_threshold is None else config.null_threshold
    if each.metric != "squad":
        ranks.warn(each.rule.sentence)
    return metrics.score(gold, found, odds, threshold, each.rule.best_scores)


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


def main(argv: list[str] | None = None) -> int:
    """The program, called from Python; see `program.run` for the exit status it returns."""
    return program.run(parse, "kdfast.evaluate:start", argv, stdout_is_result=True)
