"""The sets that readers are compared on: where the hub has them, and how they are scored.

Written from the published model cards and the hub's pages. No name has been tried on the hub. A
local file takes the place of any of them.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from kdfast.common.errors import UserError, unknown_name
from kdfast.data import read
from kdfast.data.examples import Example
from kdfast.data.read import CONVERTED
from kdfast.data.tally import Tally
from kdfast.evaluation import metric_rules, metrics


@dataclass(frozen=True)
class EvaluationSet:
    """One set. `dataset`, `config`, `split` and `revision` are the hub's names.

    revision: None is the main one. language: its code, None where it is not known.
    unanswerable: it has questions without an answer. Only there may a reader abstain, as in the
        QuestionAnsweringEvaluator of Hugging Face's `evaluate`.
    by_original: its ids are ORIGINAL-SUFFIX for a perturbed form of the question ORIGINAL.
    metric: the rule that its published figures are scored by, one of metric_rules.TITLES.
    file: what is read in place of the hub's set.
    """

    name: str
    dataset: str | None
    config: str | None
    split: str | None
    revision: str | None = None
    language: str | None = "en"
    unanswerable: bool = False
    by_original: bool = False
    metric: str = "squad"
    file: str | None = None

    @property
    def source(self) -> str:
        """The file, or the hub's set, as `records.iter_examples` takes it."""
        if self.file is not None:
            return self.file
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.dataset}{revision}:{self.config}:{self.split}"

    @property
    def rule(self) -> metric_rules.MetricRule:
        return metric_rules.find(self.metric, self.language)

    def scored_by(self, metric: str | None, language: str | None) -> "EvaluationSet":
        """This set under --metric and --language, which None leaves as they are.

        Raises UserError for a language that the rule does not know, or has no use for.
        """
        found = replace(self, metric=metric or self.metric, language=language or self.language)
        if language and found.metric != "mlqa":
            raise UserError(
                f"--language goes with --metric mlqa, and {self.name} is scored by "
                f"{found.metric}: leave it out, or give that."
            )
        metric_rules.find(found.metric, found.language)
        return found

    def read_questions(self, tally: Tally | None = None) -> list[Example]:
        """The questions. Raises UserError for any that cannot be read or scored."""
        try:
            examples = read.read_examples(self.source, split="validation", tally=tally)
            read.check_ids(self.source, examples)
            metrics.gold_answers(examples)
        except UserError as error:
            if self.file is not None:
                raise
            raise UserError(
                f"Set {self.name}: {error}. --data {self.name}=FILE takes a copy."
            ) from None
        return examples


SQUADSHIFTS = "ludwigschmidt/squadshifts"
XQUAD_LANGUAGES = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
MLQA_LANGUAGES = ("ar", "de", "en", "es", "hi", "vi", "zh")

# In the order of the published card. With CONVERTED the repository itself has only a script, which
# `datasets` refuses.
CARD = (
    EvaluationSet("squad_v2", "rajpurkar/squad_v2", "squad_v2", "validation", unanswerable=True),
    EvaluationSet("squad", "rajpurkar/squad", "plain_text", "validation"),
    EvaluationSet("adversarial_qa", "UCLNLP/adversarial_qa", "adversarialQA", "validation"),
    EvaluationSet(
        "squad_adversarial",
        "stanfordnlp/squad_adversarial",
        "AddOneSent",
        "validation",
        CONVERTED,
        by_original=True,
    ),
    EvaluationSet("squadshifts.amazon", SQUADSHIFTS, "amazon", "test", CONVERTED),
    EvaluationSet("squadshifts.new_wiki", SQUADSHIFTS, "new_wiki", "test", CONVERTED),
    EvaluationSet("squadshifts.nyt", SQUADSHIFTS, "nyt", "test", CONVERTED),
    EvaluationSet("squadshifts.reddit", SQUADSHIFTS, "reddit", "test", CONVERTED),
)
XQUAD = tuple(
    EvaluationSet(f"xquad.{code}", "google/xquad", f"xquad.{code}", "validation", language=code)
    for code in XQUAD_LANGUAGES
)
MLQA = tuple(
    EvaluationSet(
        f"mlqa.{code}",
        "facebook/mlqa",
        f"mlqa.{code}.{code}",
        "test",
        CONVERTED,
        language=code,
        metric="mlqa",
    )
    for code in MLQA_LANGUAGES
)
GERMANQUAD = EvaluationSet(
    "germanquad", "deepset/germanquad", "plain_text", "test", CONVERTED, language="de"
)
CMRC = EvaluationSet(
    "cmrc2018", "hfl/cmrc2018", "default", "validation", language="zh", metric="cmrc"
)
KORQUAD = EvaluationSet(
    "korquad",
    "KorQuAD/squad_kor_v1",
    "squad_kor_v1",
    "validation",
    language="ko",
    metric="korquad",
)
# JaQuAD's paper scores by characters and published no script.
JAQUAD = EvaluationSet(
    "jaquad",
    "SkelterLabsInc/JaQuAD",
    "default",
    "validation",
    CONVERTED,
    language="ja",
    metric="korquad",
)
SETS = {each.name: each for each in (*CARD, *XQUAD, *MLQA, GERMANQUAD, CMRC, KORQUAD, JAQUAD)}
SUITES = {"card": CARD, "xquad": XQUAD, "mlqa": MLQA}


def own_set(source: str) -> EvaluationSet:
    """A user's file or hub dataset as a set, named after it; the reader may abstain in it.

    Metric and language are those of a set of SETS where it is one.
    """
    place, config = (*source.split(":"), "")[:2]
    dataset = place.split("@")[0]
    known = [
        each for each in SETS.values() if each.dataset == dataset and config in ("", each.config)
    ]
    languages, rules = ({getattr(each, of) for each in known} for of in ("language", "metric"))
    return EvaluationSet(
        Path(re.split("[:@]", source)[0]).stem,
        *(None, None, None),
        language=languages.pop() if len(languages) == 1 else None,
        unanswerable=True,
        metric=rules.pop() if len(rules) == 1 else "squad",
        file=source,
    )


def choose(wanted: Iterable[str], files: Iterable[str]) -> list[EvaluationSet]:
    """The sets of --suite.

    Args:
        wanted: Suites or sets by name; each set is taken once.
        files: "NAME=FILE": the file that is read in place of set NAME.

    Raises:
        UserError: For a name that is not known, with the nearest one, and for a file of a set
            that is not wanted.
    """
    chosen: dict[str, EvaluationSet] = {}
    for name in wanted:
        for each in SUITES.get(name) or (_named("--suite", name),):
            chosen[each.name] = each
    for text in files:
        name, _, file = text.partition("=")
        if not file:
            raise UserError(f"--data {text} does not say which set of --suite it is: NAME=FILE.")
        if _named("--data", name).name not in chosen:
            raise UserError(f"--data {text} is no set of --suite: add {name} there.")
        chosen[name] = replace(chosen[name], file=file)
    return list(chosen.values())


def _named(role: str, name: str) -> EvaluationSet:
    if name in SETS:
        return SETS[name]
    family, _, member = name.partition(".")
    members = [each.partition(".")[2] for each in SETS if each.startswith(f"{family}.")]
    if member and members:
        raise unknown_name(f"{role} {name}:", member, members)
    raise unknown_name(role, name, [*SUITES, *SETS] if role == "--suite" else [*SETS])
