"""`python -m kdfast.evaluate`: score a reader, or a file of predictions, as SQuAD 2.0 does."""

import sys

from kdfast.common import program
from kdfast.evaluation.settings import parse

if __name__ == "__main__":  # flags come first: what is imported below takes seconds
    sys.exit(program.run(parse, "kdfast.evaluate:start", stdout_is_result=True))

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdfast.common.device import pick_device
from kdfast.common.errors import UserError
from kdfast.common.files import listed, refuse_link, sha256_of, write_json
from kdfast.common.folders import make_writable
from kdfast.common.machine import describe_machine
from kdfast.common.ranks import Ranks
from kdfast.common.run import Run
from kdfast.data.read import read_examples
from kdfast.data.tally import Tally
from kdfast.evaluation import answers, bootstrap, metrics, predictions, scoring, suites, tables
from kdfast.evaluation.evaluated_model import AnswerSettings, EvaluatedModel
from kdfast.evaluation.metric_rules import MetricRule
from kdfast.evaluation.settings import EvaluateConfig
from kdfast.evaluation.suites import EvaluationSet

FORMAT = 1  # of what is written: raise it when the meaning changes


def start(config: EvaluateConfig) -> None:
    """The work of the program."""
    with Ranks.join() as ranks:
        if printed := evaluate(config, ranks):
            print(printed)


def evaluate(config: EvaluateConfig, ranks: Ranks) -> str:
    """Score, and write what --output_dir is for; only the first rank writes.

    Returns:
        What the program prints: of one --data the official figures as one JSON object, of a
        --suite a table, and "" on any rank but the first.

    Raises:
        UserError: For a mistake in the settings, the data or a model.
    """
    config.check()
    sets = config.sets()
    output = open_folder(config.output_dir)
    if config.predictions is not None:
        scores = score_predictions(config, config.predictions, sets[0], ranks)
        return report_scores(scores, sets[0], output) if ranks.is_first else ""

    models = load_models(config, ranks)
    questions = {each.name: each.read_questions() for each in sets}
    # In a set of a suite without unanswerable questions no model may abstain.
    rule = next((each.rule for each in sets if each.unanswerable), sets[0].rule)
    thresholds = [null_threshold(config, model, rule) for model in models]
    header = header_of(config, models, sets[0].source)
    records = []
    for each in sets:
        examples = questions.pop(each.name)
        results = [
            model.answer(each, examples, threshold if each.unanswerable else math.inf)
            for model, threshold in zip(models, thresholds, strict=True)
        ]
        if not ranks.is_first:
            continue
        record = tables.set_record(each, results)
        records.append(record)
        by = f"  {each.rule.sentence}" if each.metric != "squad" else ""
        speed = f"{record['windows_per_second']:.1f} windows/s"
        ranks.warn(f"{each.name}: {scoring.line(record['metrics'])}  {speed}{by}")
        if output:
            answered = output / f"{each.name}.questions.json"
            write_json(answered, tables.question_records(results))
            summed = header | {"questions_sha256": sha256_of(answered)} | record
            write_json(output / f"{each.name}.eval.json", summed)
    if not ranks.is_first:
        return ""
    if output:
        write_json(output / "summary.json", header | {"sets": records})
        if config.suite is None:
            answers.write_predictions(results[0].evaluation.answers, output)
    if config.suite is not None:
        return tables.table(records)
    if config.compare is not None:
        for line in tables.table(records).split("\n"):
            ranks.warn(line)
    return report_scores(records[0]["metrics"], sets[0], output)


def score_predictions(
    config: EvaluateConfig, file: str, each: EvaluationSet, ranks: Ranks
) -> dict[str, float]:
    """The figures of the answers in a file, that of --predictions."""
    tally = Tally()
    examples = each.read_questions(tally)
    for note in tally.notes({}, training=False):
        ranks.warn(note)
    found = predictions.read_answers(file, examples)
    odds = predictions.read_odds(config.null_odds, examples) if config.null_odds else None
    gold = metrics.gold_answers(examples)
    missing, unknown = metrics.unmatched_ids(gold, found)
    if missing:
        ranks.warn(f"{len(missing)} questions without a prediction score 0, such as {missing[0]}.")
    if unknown:
        ranks.warn(f"{len(unknown)} predictions are of unknown questions, such as {unknown[0]}.")
    if each.metric != "squad":
        ranks.warn(each.rule.sentence)
    threshold = 1.0 if config.null_threshold is None else config.null_threshold
    return metrics.score(gold, found, odds, threshold, each.rule.best_scores)


def load_models(config: EvaluateConfig, ranks: Ranks) -> list[EvaluatedModel]:
    """The models of --model and --compare, the same on all ranks."""
    run = Run(pick_device(ranks.local_rank), ranks=ranks)
    settings = AnswerSettings(
        config.max_seq_length,
        config.max_query_length,
        config.doc_stride,
        config.max_answer_length,
        config.n_best_size,
        Path(config.cache_dir).expanduser(),
        config.mixed_precision,
    )
    models = [
        EvaluatedModel(name, role, settings, run)
        for role, name in (("--model", config.model), ("--compare", config.compare))
        if name is not None
    ]
    ranks.assert_same_on_all_ranks(
        {"settings": config, "weights": [model.weights for model in models]}
    )
    return models


def header_of(
    config: EvaluateConfig, models: list[EvaluatedModel], timed_on: str
) -> dict[str, Any]:
    """What each result file says of models, settings and machine. timed_on: data for latencies."""
    model = models[0]
    about = [each.describe(timed_on) for each in models]
    return {
        "format": FORMAT,
        "model": about[0],
        "compared_with": about[1] if len(about) > 1 else None,
        "settings": {
            **asdict(model.windows),
            "max_answer_length": config.max_answer_length,
            "precision": model.run.precision,
            "null_threshold_from": config.null_threshold_from,
        },
        "bootstrap": bootstrap.SETTINGS,
        "ranks": model.run.ranks.count,
        **describe_machine(model.run.device),
    }


def null_threshold(config: EvaluateConfig, model: EvaluatedModel, rule: MetricRule) -> float:
    """The threshold of a model: given, the best for F1 by `rule` on other data, or 0.

    Raises UserError for a result that has none, is of another rule, or of one model where there
    are two, and where the model does best by always abstaining: the official script names that 0.
    """
    name = config.null_threshold_from
    if name is None:
        return 0.0 if config.null_threshold is None else config.null_threshold
    figures = predictions.recorded_figures(name, rule)
    if figures is None:
        model.run.ranks.warn(f"{model.name}: looking for the best threshold on {name}")
        examples = read_examples(name, split="validation")
        other = suites.own_set(name).scored_by(rule.name, rule.language)
        figures = model.answer(other, examples, 0.0).evaluation.metrics
    elif config.compare:
        raise UserError(
            f"--null_threshold_from {name} is the result of one reader, and --compare "
            "makes two: give data, on which each gets its own threshold."
        )
    if figures["best_f1"] <= 100.0 * figures.get("NoAns_total", 0) / figures["total"]:
        raise UserError(
            f"--null_threshold_from {name}: {model.name} does best there by answering nothing, "
            "so there is no threshold to take: give one by --null_threshold."
        )
    return figures["best_f1_thresh"]


def report_scores(scores: dict[str, float], each: EvaluationSet, output: Path | None) -> str:
    """The official figures and the rule's name as JSON, which also goes into metrics.json."""
    named = each.rule.named() | scores
    if output:
        write_json(output / "metrics.json", named)
    return json.dumps(named, indent=2)


def open_folder(name: str | None) -> Path | None:
    """--output_dir, created and writable; None without one."""
    if name is None:
        return None
    folder = Path(name).expanduser()
    try:
        make_writable(folder)
        for path in listed(folder, "*.json"):  # found now, not after the last answer
            refuse_link(path)
    except OSError as error:
        raise UserError(
            f"--output_dir {folder} cannot be written ({error.strerror}): name another."
        ) from error
    return folder


def main(argv: list[str] | None = None) -> int:
    """The program, called from Python; see `program.run` for the exit status it returns."""
    return program.run(parse, "kdfast.evaluate:start", argv, stdout_is_result=True)
