"""Pictures of a run, drawn with matplotlib from its result files.

A function that draws returns None where the files lack what it shows.
"""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kdfast.cards.render import plain
from kdfast.cards.run_files import Evaluated, Record, RunFiles, short
from kdfast.common.files import listed, refuse_link, write_bytes
from kdfast.common.folders import remove, subfolder
from kdfast.evaluation.metrics import normalize_answer
from kdfast.training.log import lost_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = "figures"
BLUE, ORANGE, GREEN, GREY = "#2a6fbb", "#d9730d", "#2e8b57", "#8a8f98"
PALE_GREY, PALE_BLUE, PALE_ORANGE = "#d5d8dc", "#a9c8ea", "#f2c396"
WIDTH = 7.2  # inches
LONGEST_NAME = 40  # characters
AGREEMENT = {
    "both right": GREEN,
    "only this model": PALE_BLUE,
    "only the other": PALE_ORANGE,
    "both wrong, alike": GREY,
    "both wrong, apart": PALE_GREY,
}


def save(files: RunFiles, others: Sequence[RunFiles] = ()) -> dict[str, str]:
    """Draw all that the files allow into figures/.

    Args:
        files: The run.
        others: Other runs, for quality against latency.

    Returns:
        Picture, relative to the run -> caption.
    """
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):  # a "$" in a name begins no formula
        return _save(files, others)


def _save(files: RunFiles, others: Sequence[RunFiles]) -> dict[str, str]:
    lost = lost_steps(files.steps, files.run["steps"])
    drawn = {
        "loss": (
            loss(files.steps),
            f"Parts of the loss, and the learning rate{f'; {lost[:-1]}' if lost else ''}",
        ),
        "evaluation": (evaluation(files.evaluations), "Exact match and F1 over the run"),
        "agreement": (agreement(files), "How often both models are right, or wrong together"),
        "tradeoff": (tradeoff(files, others), "Quality against latency"),
    }
    folder = files.folder / FOLDER
    found = {}
    refuse_link(folder)
    for path in listed(folder, "*.png"):
        remove(path)
    for name, (figure, caption) in drawn.items():
        if figure is not None:
            subfolder(folder)
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=150)
            write_bytes(folder / f"{name}.png", picture.getvalue())
            found[f"{FOLDER}/{name}.png"] = caption
    return found


def loss(steps: Sequence[Record]) -> "Figure | None":
    """Soft and hard part over steps, single ones pale, their running mean bold; below, the rate."""
    if not steps:
        return None
    figure, (upper, lower) = _figure(height=4.6, height_ratios=(3, 1))
    at = [each["step"] for each in steps]
    for name, color, label in (
        ("soft", BLUE, "soft: the teacher's answers"),
        ("hard", ORANGE, "hard: the gold answers"),
    ):
        values = np.array([each[name] for each in steps], dtype=np.float64)
        if np.nan_to_num(values).any():
            upper.plot(at, values, color=color, alpha=0.25, linewidth=0.8)
            upper.plot(at, _running_mean(values), color=color, label=label)
    upper.set_ylabel("loss")
    upper.set_ylim(bottom=0)
    upper.legend()
    lower.plot(at, [each["lr"] for each in steps], color=GREY)
    lower.set_ylabel("learning rate")
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lower.set_ylim(bottom=0)
    lower.set_xlabel("optimizer step")
    return figure


def evaluation(evaluations: Sequence[Record]) -> "Figure | None":
    """EM and F1 over steps; None with fewer than two evaluations."""
    if len(evaluations) < 2:
        return None
    figure, (axes,) = _figure()
    at = [each["evaluated_after"] for each in evaluations]
    for name, label, color in (("f1", "F1", BLUE), ("exact", "exact match", ORANGE)):
        axes.plot(at, [each[name] for each in evaluations], "o-", color=color, label=label)
    axes.set_ylabel("%")
    axes.set_xlabel("after optimizer step")
    axes.legend()
    return figure


def agreement(files: RunFiles) -> "Figure | None":
    """A bar a set: who of the two models is right, by exact match, and whether wrong alike."""
    bars = {}
    for result in files.results:
        questions = files.questions(result)
        for other in files.models(result)[1:]:
            if questions:
                label = f"{_text(result['name'])}\nagainst {_label(other)}"
                bars[label] = agreement_shares(questions)
    if not bars:
        return None
    figure, (axes,) = _figure(height=1.4 + 0.55 * len(bars))
    left = np.zeros(len(bars))
    for kind, color in AGREEMENT.items():
        shares = np.array([each[kind] for each in bars.values()])
        drawn = axes.barh(list(bars), shares, left=left, color=color, label=kind, height=0.6)
        texts = [f"{share:.0f}" if share >= 5 else "" for share in shares]
        axes.bar_label(drawn, texts, label_type="center")
        left += shares
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the questions")
    axes.invert_yaxis()
    axes.grid(False)
    figure.legend(loc="outside upper center", ncols=len(AGREEMENT), fontsize=8)
    return figure


def agreement_shares(questions: Mapping[str, Record]) -> dict[str, float]:
    """Kind of AGREEMENT -> its share of the questions, in percent."""
    counts = Counter(_agreement(own, own["compared"]) for own in questions.values())
    return {kind: 100 * counts[kind] / len(questions) for kind in AGREEMENT}


def _agreement(own: Record, other: Record) -> str:
    """Right is an exact match; alike are answers that the official script takes for one."""
    if own["exact"] == other["exact"] == 1:
        return "both right"
    if own["exact"] == 1:
        return "only this model"
    if other["exact"] == 1:
        return "only the other"
    alike = normalize_answer(own["answer"]) == normalize_answer(other["answer"])
    return "both wrong, alike" if alike else "both wrong, apart"


class Point(NamedTuple):
    """A model in the picture of quality against latency."""

    latency: float  # median of one question, ms
    f1: float
    parameters: int
    color: str


def tradeoff(files: RunFiles, others: Sequence[RunFiles] = ()) -> "Figure | None":
    """F1 against latency, a point a model; None with fewer than two models measured alike.

    On the run's set that most models answered.
    """
    found = [(each["name"], points(each, [files, *others])) for each in files.results]
    data, models = max(found, key=lambda each: len(each[1]), default=("", {}))
    if len(models) < 2:
        return None
    figure, (axes,) = _figure()
    largest = max(point.parameters for point in models.values())
    for label, point in models.items():
        size, place = 40 + 360 * point.parameters / largest, (point.latency, point.f1)
        axes.scatter(*place, s=size, color=point.color, alpha=0.7)
        text = f"{label}, {point.parameters / 1e6:.1f} M"
        axes.annotate(text, place, (0, 13), textcoords="offset points", ha="center")
    axes.set_xlabel("median latency of one question, ms")
    axes.set_ylabel(f"F1 on {_text(data)}")
    axes.margins(0.25, 0.25)
    axes.set_xlim(left=0)
    return figure


def points(like: Record, runs: Sequence[RunFiles]) -> dict[str, Point]:
    """Label -> point of each model that was measured like the result `like`.

    A model that several runs name, by its weights, is there once.
    """
    found, seen = {}, set()
    for run, result in ((each, result) for each in runs for result in each.results):
        role, own_color = ("student", BLUE) if run.teachers else ("baseline", GREY)
        for number, each in enumerate(run.models(result)):
            weights = each.model["weights_sha256"]
            if weights not in seen and _conditions(result) == _conditions(like):
                seen.add(weights)
                found[_label(each) if number else f"{_text(run.name)} ({role})"] = Point(
                    latency=each.model["latency"]["median_ms"],
                    f1=each.figures["metrics"]["f1"],
                    parameters=each.model["parameters"],
                    color=ORANGE if number else own_color,
                )
    return found


def _conditions(result: Record) -> list[Any]:
    """What two results must share to be compared: questions, machine, precision."""
    precision, questions = result["settings"]["precision"], result["metrics"]["total"]
    return [result["name"], questions, result["hardware"], precision]


def _label(other: Evaluated) -> str:
    """The other model of a result: its name and, if it taught, its role."""
    name = _text(short(other.model["name"]))
    return f"{name} (teacher)" if other.name == "teacher" else name


def _text(name: str) -> str:
    """A name in a picture: of a length that leaves room for the rest."""
    name = plain(name)
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last fiftieth of the steps, at least 5 of them; NaN does not count."""
    width = max(5, len(values) // 50)
    there = np.isfinite(values)
    sums, counts = np.cumsum(np.where(there, values, 0.0)), np.cumsum(there, dtype=np.float64)
    for each in (sums, counts):
        each[width:] = each[width:] - each[:-width]
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _figure(
    height: float = 3.2, height_ratios: Sequence[float] = (1,)
) -> "tuple[Figure, list[Axes]]":
    """A figure and its axes, one below the other, with one x axis."""
    # No pyplot: it would choose a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    rows = len(height_ratios)
    grid = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=height_ratios)
    axes = list(grid[:, 0])
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25)
    return figure, axes
