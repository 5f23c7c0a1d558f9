"""Pictures of a run, drawn with matplotlib from its result files.

Each function returns None where the files have not what it shows.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from kdfast.cards.run_files import RunFiles, short
from kdfast.evaluation.metrics import normalize_answer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "figures"
BLUE, ORANGE, GREEN, GREY = "#2a6fbb", "#d9730d", "#2e8b57", "#8a8f98"
PALE_GREY, PALE_BLUE, PALE_ORANGE = "#d5d8dc", "#a9c8ea", "#f2c396"
WIDTH = 7.2  # inches


def is_possible() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def save(files: RunFiles, beside: Sequence[RunFiles] = ()) -> dict[str, str]:
    """Draw all that the files allow into figures/; returns picture, relative to the run -> caption.

    beside: other runs, for quality against latency.
    """
    drawn = {
        "loss": (loss(files.steps), "Parts of the loss, and the learning rate"),
        "evaluation": (evaluation(files.evaluations), "Exact match and F1 over the run"),
        "padding": (
            padding(files.steps, files.config["max_seq_length"]),
            "Share of what was computed that was padding",
        ),
        "agreement": (agreement(files), "How often both models are right, or wrong together"),
        "tradeoff": (tradeoff([files, *beside]), "Quality against latency"),
    }
    folder = files.folder / FOLDER
    for path in folder.glob("*.png"):
        path.unlink()
    found = {}
    for name, (figure, caption) in drawn.items():
        if figure is not None:
            folder.mkdir(exist_ok=True)
            figure.savefig(folder / f"{name}.png", dpi=150)
            found[f"{FOLDER}/{name}.png"] = caption
    return found


def loss(steps: Sequence[Mapping[str, Any]]) -> "Figure | None":
    """Soft and hard part over steps, single ones pale, their running mean bold; below, the rate."""
    if not steps:
        return None
    figure, (upper, lower) = _figure(height=4.6, height_ratios=(3, 1))
    at = np.array([each["step"] for each in steps])
    for name, color, label in (
        ("soft", BLUE, "soft: the teacher's answers"),
        ("hard", ORANGE, "hard: the gold answers"),
    ):
        values = np.array([each[name] for each in steps], dtype=np.float64)
        if np.isfinite(values).any() and np.nanmax(np.abs(values)) > 0:
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


def evaluation(evaluations: Sequence[Mapping[str, Any]]) -> "Figure | None":
    """EM and F1 over steps; None with fewer than two evaluations."""
    if len(evaluations) < 2:
        return None
    figure, (axes,) = _figure()
    at = [each["evaluated_after"] for each in evaluations]
    for name, label, color in (("f1", "F1", BLUE), ("exact", "exact match", ORANGE)):
        axes.plot(at, [each[name] for each in evaluations], "o-", color=color, label=label)
    axes.set_ylabel("%")
    axes.set_xlabel("optimizer steps behind the model")
    axes.legend()
    return figure


def padding(steps: Sequence[Mapping[str, Any]], max_seq_length: int) -> "Figure | None":
    """Padding per step, and what it would have been with every window padded to max_seq_length."""
    if not steps:
        return None
    figure, (axes,) = _figure()
    at = [each["step"] for each in steps]
    tokens, padded, windows = (
        np.array([each[name] for each in steps], dtype=np.float64)
        for name in ("tokens", "padded_tokens", "windows")
    )
    full = windows * max_seq_length
    for computed, color, label in (
        (full, GREY, f"every window padded to {max_seq_length}"),
        (padded, BLUE, "this run"),
    ):
        mean = 100 * (1 - tokens.sum() / computed.sum())
        axes.plot(at, 100 * (1 - tokens / computed), color=color, label=f"{label}: {mean:.1f} %")
    axes.set_ylabel("padding, % of the tokens computed")
    axes.set_xlabel("optimizer step")
    axes.set_ylim(0, 100)
    axes.legend()
    return figure


def agreement(files: RunFiles) -> "Figure | None":
    """A bar a set: who of the two models is right, by exact match, and whether wrong alike."""
    bars = {}
    for result in files.results:
        questions = files.questions(result)
        if "compared" in result and questions:
            title = f"{result['name']}\nbeside {_label(files, result)}"
            bars[title] = agreement_shares(questions)
    if not bars:
        return None
    figure, (axes,) = _figure(height=1.4 + 0.55 * len(bars))
    legend = {
        "both right": GREEN,
        "only this model": PALE_BLUE,
        "only the other": PALE_ORANGE,
        "both wrong, alike": GREY,
        "both wrong, apart": PALE_GREY,
    }
    left = np.zeros(len(bars))
    columns = np.array(list(bars.values())).T
    for (name, color), shares in zip(legend.items(), columns, strict=True):
        axes.barh(list(bars), shares, left=left, color=color, label=name, height=0.6)
        for row, share in enumerate(shares):
            if share >= 5:
                axes.text(left[row] + share / 2, row, f"{share:.0f}", ha="center", va="center")
        left += shares
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the questions")
    axes.invert_yaxis()
    axes.grid(False)
    figure.legend(loc="outside upper center", ncols=5, fontsize=8)
    return figure


def agreement_shares(questions: Mapping[str, Mapping[str, Any]]) -> list[float]:
    """Percentages: both right, only the first, only the other, both wrong with one answer, and
    with two. Right is an exact match."""
    counts = dict.fromkeys(("both", "own", "other", "alike", "apart"), 0)
    for line in questions.values():
        other = line["compared"]
        if line["exact"] == other["exact"] == 1:
            kind = "both"
        elif line["exact"] == 1:
            kind = "own"
        elif other["exact"] == 1:
            kind = "other"
        elif normalize_answer(line["answer"]) == normalize_answer(other["answer"]):
            kind = "alike"
        else:
            kind = "apart"
        counts[kind] += 1
    return [100 * count / len(questions) for count in counts.values()]


def tradeoff(runs: Sequence[RunFiles]) -> "Figure | None":
    """F1 against latency, a point a model; None with fewer than two models measured alike.

    On the set that most models answered, on one kind of hardware and in one precision.
    """
    groups = points(runs)
    key = max(groups, key=lambda each: len(groups[each]), default=None)
    if key is None or len(groups[key]) < 2:
        return None
    best, where = groups[key], key[0]
    figure, (axes,) = _figure()
    largest = max(point["parameters"] for point in best.values())
    for label, point in best.items():
        size = 40 + 360 * point["parameters"] / largest
        axes.scatter(point["latency"], point["f1"], s=size, color=point["color"], alpha=0.7)
        text = f"{label}, {point['parameters'] / 1e6:.1f} M"
        axes.annotate(
            text, (point["latency"], point["f1"]), (0, 13), textcoords="offset points", ha="center"
        )
    axes.set_xlabel("median latency of one question, ms")
    axes.set_ylabel(f"F1 on {where}")
    axes.margins(0.25, 0.25)
    axes.set_xlim(left=0)
    return figure


def points(runs: Sequence[RunFiles]) -> dict[tuple, dict[str, dict[str, Any]]]:
    """What may be compared -> label of a model -> its latency (ms), F1, parameters and color.

    A model that several runs name, by its weights, is there once.
    """
    groups: dict[tuple, dict[str, dict[str, Any]]] = {}
    seen = set()
    for run in runs:
        for result in run.results:
            hardware = tuple(sorted(result["hardware"].items()))
            precision, total = result["settings"]["precision"], result["metrics"]["total"]
            key = (result["name"], total, hardware, precision)
            is_student = run.teacher is not None
            label = f"{run.name} ({'student' if is_student else 'baseline'})"
            models = [(label, BLUE if is_student else GREY, result["model"], result["metrics"])]
            if "compared" in result:
                other = result["compared_with"]
                models.append((_label(run, result), ORANGE, other, result["compared"]["metrics"]))
            for label, color, model, metrics in models:
                if (key, model["weights_sha256"]) in seen:
                    continue
                seen.add((key, model["weights_sha256"]))
                groups.setdefault(key, {})[label] = {
                    "latency": model["latency"]["median_ms"],
                    "f1": metrics["f1"],
                    "parameters": model["parameters"],
                    "color": color,
                }
    return groups


def _label(files: RunFiles, result: Mapping[str, Any]) -> str:
    """The other model of a result: its role, if it taught, and its name."""
    name = short(result["compared_with"]["name"])
    return f"{name} (teacher)" if files.other(result) == "teacher" else name


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last fiftieth of the steps, at least 5 of them; NaN does not count."""
    width = max(5, len(values) // 50)
    there = np.isfinite(values)
    sums = np.cumsum(np.where(there, values, 0.0))
    counts = np.cumsum(there, dtype=np.float64)
    sums[width:], counts[width:] = sums[width:] - sums[:-width], counts[width:] - counts[:-width]
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _figure(
    height: float = 3.2, height_ratios: Sequence[float] = (1,)
) -> tuple["Figure", np.ndarray]:
    """A figure and its axes, one below the other, with one x axis."""
    # No pyplot: it would choose a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(
        len(height_ratios), 1, sharex=True, squeeze=False, height_ratios=height_ratios
    )[:, 0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25)
    return figure, axes
