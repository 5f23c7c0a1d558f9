"""The flags of `kdfast.evaluate`, in a module that is quick to import."""

import math
from dataclasses import dataclass, field
from typing import Literal

from kdfast.common import program
from kdfast.common.errors import UserError
from kdfast.common.settings import check_values, flag
from kdfast.evaluation import suites

ABOUT = (
    "`python -m kdfast.evaluate`: score a reader, or a file of predictions, as SQuAD 2.0 or "
    "another benchmark does."
)


@dataclass(frozen=True)
class EvaluateConfig:
    """Give --model to answer the questions, or --predictions to score answers that are there."""

    data: list[str] | None = field(
        default=None,
        metadata={
            "action": "extend",
            "metavar": "DATA",
            "help": "File of SQuAD's or another form (docs/data.md), or a hub dataset "
            "id[@revision][:config[:split]]; with --suite NAME=FILE, to read set NAME from there.",
        },
    )
    suite: list[str] | None = field(
        default=None,
        metadata={
            "action": "extend",
            "metavar": "NAME",
            "help": "Sets to evaluate on: card (the eight of the published card), xquad or mlqa "
            "(every language), or one such as squadshifts.nyt, xquad.de, cmrc2018, korquad or "
            "jaquad.",
        },
    )
    metric: Literal["squad", "mlqa", "cmrc", "korquad"] | None = flag(
        None,
        "Whose rule scores the answers. Default: that of the set, where it is one of --suite or "
        "its hub dataset, else squad. korquad is F1 over characters.",
    )
    language: str | None = flag(None, "For --metric mlqa: the language of the answers, such as zh.")
    model: str | None = flag(None, "Folder or hub id of the reader.")
    compare: str | None = flag(None, "Another reader, for a paired comparison with --model.")
    predictions: str | None = flag(
        None, "JSON file, question id to answer, or JSONL of kdfast.predict, instead of --model."
    )
    null_odds: str | None = flag(None, "JSON file, question id to null odds, for --predictions.")
    null_threshold: float | None = flag(
        None,
        "Null odds above this mean no answer. Default: 0.0 for a model's score difference, "
        "1.0 for files, as in the official script.",
        most=None,
    )
    null_threshold_from: str | None = flag(
        None,
        "Take the threshold of the best F1 on other data, which the reader answers first, or in a "
        "result that an evaluation wrote.",
    )
    output_dir: str | None = flag(None, "Folder for the results and, of a model, its answers.")
    cache_dir: str = flag("~/.cache/kdfast", "Folder for prepared features.")
    max_seq_length: int | None = flag(
        None,
        "Tokens in a window, special tokens included. Default, for this and the next two: as "
        "--model was trained, by its run.json, else 384, 64 and 128; as far as it reads.",
        above=0,
    )
    max_query_length: int | None = flag(None, "Tokens of the question that are kept.", above=0)
    doc_stride: int | None = flag(
        None, "Context tokens from the start of a window to that of the next.", above=0
    )
    max_answer_length: int = flag(30, "Tokens in the longest answer that is considered.", above=0)
    n_best_size: int = flag(
        20, "Answers per question in nbest_predictions.json.", above=0, most=1000
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = flag(
        None,
        "Type of the matrix products. Default: fp16 on a GPU, or what model and card can instead; "
        "no (fp32) on a CPU.",
    )

    def check(self) -> None:
        """Raise UserError for flags that are missing, contradictory or out of range."""
        check_values(self)
        if not self.data and not self.suite:
            raise UserError("--data is missing: name a SQuAD file or a hub dataset, or a --suite.")
        if (self.model is None) == (self.predictions is None):
            raise UserError("Give either --model or --predictions, and not both.")
        for needy in ("suite", "compare", "null_threshold_from"):
            if getattr(self, needy) and self.model is None:
                raise UserError(f"--{needy} goes with --model: leave it out with --predictions.")
        if self.null_odds and self.predictions is None:
            raise UserError("--null_odds goes with --predictions: leave it out with --model.")
        if self.null_threshold is not None:
            if self.null_threshold_from:
                raise UserError(
                    "--null_threshold and --null_threshold_from exclude each other: give one."
                )
            if math.isnan(self.null_threshold):
                raise UserError("--null_threshold is nan: give a number.")
        self.sets()

    def sets(self) -> list[suites.EvaluationSet]:
        """The sets of --suite, or the one that --data is, each with the rule that scores it.

        Raises UserError for unknown names, and a rule that has no language.
        """
        data = self.data or []
        if self.suite is None:
            if len(data) != 1:
                raise UserError("--data names several: give one, or name them as sets of --suite.")
            return [suites.own_set(data[0]).scored_by(self.metric, self.language)]
        if self.language:
            raise UserError("--language goes with --data: the sets of --suite have their own.")
        return [each.scored_by(self.metric, None) for each in suites.choose(self.suite, data)]


def parse(argv: list[str]) -> EvaluateConfig:
    """The settings that a command line gives. Raises UserError for unknown flags and values."""
    return program.parse(program.parser_of(EvaluateConfig, "evaluate", ABOUT), argv)
