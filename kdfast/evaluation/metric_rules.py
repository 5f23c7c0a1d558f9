"""The rules by which benchmarks score an answer: SQuAD's, MLQA's, CMRC 2018's, KorQuAD's.

Each is held to the figures of its official script (tests/golden/make_metric_figures.py): SQuAD's
evaluate-v2.0.py, in `metrics`; mlqa_evaluation_v1.py; cmrc2018_evaluate.py, version 6; KorQuAD's
evaluate-v1.0.py. A rule compares one answer with one gold answer; how the questions of a set come
together, thresholds and intervals are the same under each, those of `metrics`.

What the scripts do, and so the rules: under MLQA's and KorQuAD's a gold answer that normalises to
nothing is kept, and an answer that does so too is an exact match with F1 0. CMRC's common part is
the longest run of equal segments, one after another.

The official scripts know no questions without an answer. Here no answer is right where it
normalises as "" does, and scores 1 in both figures. One more difference: CMRC's script cuts what is
not Chinese into sentences, by NLTK's English Punkt model, before it cuts words. Here it is one
sentence, so that a full stop inside it stays with its word: no figure depends on a download, and
no gold answer of CMRC 2018's development set is cut otherwise.
"""

import functools
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from kdfast.common.errors import UserError
from kdfast.evaluation import metrics

Scorer = Callable[[str, str], float]

MLQA_ARTICLES = {
    "ar": "ال",  # inside a word too: the official expression asks for no boundary
    "de": r"\b(?:ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "en": r"\b(?:a|an|the)\b",
    "es": r"\b(?:un|una|unos|unas|el|la|los|las)\b",
    "hi": None,
    "vi": r"\b(?:của|là|cái|chiếc|những)\b",
    "zh": None,
}
HAN = re.compile("([\u4e00-\u9fa5])")
CMRC_PUNCTUATION = str.maketrans("", "", "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
KORQUAD_BLANKS = str.maketrans(dict.fromkeys("'\"《》<>〈〉()‘’", " "))


@dataclass(frozen=True)
class MetricRule:
    """How answers are scored.

    name: as --metric has it. language: of MLQA's rule. best_scores: (gold answers, answer) ->
    exact, 0 or 1, and F1, 0 to 1, each the best over the gold answers, () for none.
    """

    name: str
    language: str | None
    best_scores: metrics.BestScores

    @property
    def label(self) -> str:
        """For a table, such as mlqa (zh)."""
        return f"{self.name} ({self.language})" if self.language else self.name

    @property
    def sentence(self) -> str:
        return f"Scored by {TITLES[self.name]}{f' for {self.language}' * bool(self.language)}."

    def named(self) -> dict[str, str]:
        """The rule in a result file."""
        return {"metric": self.name} | ({"language": self.language} if self.language else {})


TITLES = {
    "squad": "SQuAD's rule",
    "mlqa": "MLQA's rule",
    "cmrc": "CMRC 2018's rule (F1 over Chinese characters and other words)",
    "korquad": "KorQuAD's rule (F1 over characters)",
}


def find(name: str, language: str | None = None) -> MetricRule:
    """The rule of a name in TITLES; only MLQA's asks for a language.

    Raises UserError where that is missing or has no rule, and where CMRC's package is absent.
    """
    if name == "mlqa":
        if language not in MLQA_ARTICLES:
            given = "" if language is None else f", which has none for {language}"
            raise UserError(
                f"--metric mlqa has a rule for each language{given}: give --language, one of "
                f"{', '.join(MLQA_ARTICLES)}."
            )
        normalize = functools.partial(mlqa_words, language=language)
        return MetricRule(name, language, _best_over(_equal(normalize), _bag(normalize)))
    if name == "cmrc":
        _tokenize()  # fails now rather than after all questions are answered
    return MetricRule(name, None, BEST_SCORES[name])


def mlqa_words(text: str, language: str) -> list[str]:
    """Lower case, no punctuation of any script, no articles; words, in Chinese characters."""
    text = "".join(each for each in text.lower() if not _is_punctuation(each))
    if articles := MLQA_ARTICLES[language]:
        text = re.sub(articles, " ", text)
    return HAN.sub(r" \1 ", text).split() if language == "zh" else text.split()


def cmrc_text(text: str) -> str:
    """Lower case, without the marks that CMRC's script names."""
    return text.lower().strip().translate(CMRC_PUNCTUATION)


def cmrc_segments(text: str) -> list[str]:
    """Chinese characters, and between them the words that NLTK sees."""
    found: list[str] = []
    for piece in HAN.split(cmrc_text(text)):
        found += [piece] if HAN.fullmatch(piece) else _tokenize()(piece)
    return found


def korquad_words(text: str) -> list[str]:
    """Lower case; quotes and brackets part words, other ASCII punctuation goes."""
    return text.translate(KORQUAD_BLANKS).lower().translate(metrics.PUNCTUATION).split()


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


@functools.cache
def _tokenize() -> Callable[[str], list[str]]:
    try:
        from nltk.tokenize import NLTKWordTokenizer
    except ImportError:
        raise UserError("--metric cmrc needs a package: pip install nltk.") from None
    return NLTKWordTokenizer().tokenize


def _equal(normalize: Callable[[str], Sequence]) -> Scorer:
    return lambda answer, gold: float(normalize(answer) == normalize(gold))


def _f1(same: int, answer: Sequence, gold: Sequence) -> float:
    if same == 0:
        return 0.0
    precision, recall = same / len(answer), same / len(gold)
    return (2 * precision * recall) / (precision + recall)


def _bag(normalize: Callable[[str], Sequence]) -> Scorer:
    """F1 over what two normalised texts share, in any order."""

    def score(answer: str, gold: str) -> float:
        ours, theirs = normalize(answer), normalize(gold)
        return _f1(sum((Counter(ours) & Counter(theirs)).values()), ours, theirs)

    return score


def _longest_run(answer: str, gold: str) -> float:
    """F1 over the longest run of segments that two texts share."""
    ours, theirs = cmrc_segments(answer), cmrc_segments(gold)
    matcher = SequenceMatcher(None, ours, theirs, autojunk=False)
    return _f1(matcher.find_longest_match().size, ours, theirs)


def _best_over(exact: Scorer, f1: Scorer) -> metrics.BestScores:
    def best_scores(golds: tuple[str, ...], answer: str) -> tuple[float, float]:
        if not golds:
            return (exact(answer, ""),) * 2
        return max(exact(answer, gold) for gold in golds), max(f1(answer, gold) for gold in golds)

    return best_scores


BEST_SCORES = {
    "squad": metrics.best_scores,
    "cmrc": _best_over(_equal(cmrc_text), _longest_run),
    "korquad": _best_over(_equal(korquad_words), _bag(lambda text: "".join(korquad_words(text)))),
}
SQUAD = find("squad")
