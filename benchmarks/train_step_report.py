"""What bench_train_step.py measured: as text, as JSON, as a picture."""

from pathlib import Path

from . import records
from .train_candidates import PARTS
from .workload import FORMULA, forward_operations

NAMES = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
COLOURS = ("#9db4c8", "#5f8fb3", "#1f5f8b", "#123d5c")
PART_COLOURS = ("#d08c3c", "#1f5f8b", "#8a4f10", "#9db4c8", "#6b8e5a", "#555555")


def row(cell, name: str, turns: list, windows, config, peak: float) -> dict:
    """One candidate in one cell, over all its turns. peak: operations per second."""
    seconds = sum(turn.seconds for turn in turns)
    lengths = [windows.lengths[turn.indices] for turn in turns]
    tokens = sum(int(each.sum()) for each in lengths)
    done = 3 * sum(forward_operations(config, each) for each in lengths)
    parts = {part: sum(turn.parts.get(part, 0.0) for turn in turns) for part in PARTS}
    return {
        "precision": NAMES[cell.precision],
        "batch": cell.batch,
        "attention_dropout": cell.attention_dropout,
        "candidate": name,
        "windows_per_second": round(sum(len(each) for each in lengths) / seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "padding": round(1 - tokens / sum(turn.padded_tokens for turn in turns), 4),
        "share_of_peak": round(done / seconds / peak, 4),
        "peak_gflops": round(peak / 1e9, 1),
        "seconds": [round(turn.seconds, 4) for turn in turns],
        "parts": {part: round(each / seconds, 4) for part, each in parts.items() if each},
    }


def cells(report: dict) -> list[list[dict]]:
    """The rows, cell by cell."""
    found: dict[tuple, list[dict]] = {}
    for each in report["rows"]:
        key = (each["attention_dropout"], each["precision"], each["batch"])
        found.setdefault(key, []).append(each)
    return list(found.values())


def named(cell: list[dict], candidate: str) -> dict:
    return next(each for each in cell if each["candidate"] == candidate)


def text(report: dict) -> list[str]:
    """The page that is printed."""
    lines = [f"{name}: {value}" for name, value in report["machine"].items()]
    lines += [
        f"windows: {report['windows']}",
        "",
        "x: times that kdfast's real tokens per second are the candidate's. peak: share of the",
        "matrix-multiply rate of the same type and threads, measured between the turns. memory:",
        "resident at the peak of a step, beyond what was resident before it.",
        *FORMULA,
        "",
        f"{'type':<6}{'batch':>5}{'attention':>10}  {'candidate':<24}{'windows/s':>10}"
        f"{'tokens/s':>10}{'padding':>9}{'peak':>7}{'memory':>9}{'x':>7}",
    ]
    for cell in cells(report):
        ours = named(cell, "kdfast")["tokens_per_second"]
        for each in cell:
            memory = each["peak_memory"]
            lines.append(
                f"{each['precision']:<6}{each['batch']:>5}{each['attention_dropout']:>10}"
                f"  {each['candidate']:<24}{each['windows_per_second']:>10.2f}"
                f"{each['tokens_per_second']:>10.0f}{100 * each['padding']:>8.1f}%"
                f"{100 * each['share_of_peak']:>6.1f}%"
                f"{f'{memory / 2**30:.2f} GB' if memory else '':>9}"
                f"{ours / each['tokens_per_second']:>7.2f}"
            )
    lines += ["", "Parts of kdfast's step, in % of its time:", ""]
    lines.append(f"{'':<24}" + "".join(f"{part:>11}" for part in PARTS) + f"{'outside':>11}")
    for cell in cells(report):
        each = named(cell, "kdfast")
        outside = 1 - each["parts"]["forward"] - each["parts"]["backward"]
        lines.append(
            f"{_label(each):<24}"
            + "".join(f"{100 * each['parts'].get(part, 0):>11.2f}" for part in PARTS)
            + f"{100 * outside:>11.2f}"
        )
    return lines


def _label(each: dict) -> str:
    return f"{each['precision']}, {each['batch']}, dropout {each['attention_dropout']}"


def write(report: dict) -> list[str]:
    """Write train_step_cpu.json and .png next to this file; says what was written."""
    path = records.HERE / "train_step_cpu.json"
    return [
        records.write(path, report),
        records.picture(report, path.with_suffix(".png"), draw),
    ]


def draw(report: dict, path: Path) -> None:
    """Speed-up of kdfast over each candidate, and the parts of its step."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(12, 4.6), dpi=150, width_ratios=[1.5, 1], layout="constrained"
    )
    usual = [cell for cell in cells(report) if cell[0]["attention_dropout"] > 0]
    others = [each["candidate"] for each in usual[-1] if not each["candidate"].startswith("kdfast")]
    width = 0.8 / len(others)
    for number, (name, colour) in enumerate(zip(others, COLOURS, strict=True)):
        values = [
            named(cell, "kdfast")["tokens_per_second"] / named(cell, name)["tokens_per_second"]
            for cell in usual
        ]
        places = [i + (number - (len(others) - 1) / 2) * width for i in range(len(usual))]
        bars = left.bar(places, values, width, label=name, color=colour)
        left.bar_label(bars, [f"{value:.1f}×" for value in values], fontsize=8, padding=1)
    labels = [f"{cell[0]['precision']}, {cell[0]['batch']} windows" for cell in usual]
    left.set_xticks(range(len(usual)), labels, fontsize=9)
    left.axhline(1, color="#888888", linewidth=0.8)
    left.set_ylim(0, 1.3 * left.get_ylim()[1])
    left.set_title("kdfast: times the real tokens per second of", fontsize=11, loc="left")
    left.legend(frameon=False, ncols=2, loc="upper left", fontsize=9)

    ours = [named(cell, "kdfast") for cell in cells(report)]
    begun = [0.0] * len(ours)
    for part, colour in zip(PARTS, PART_COLOURS, strict=True):
        shares = [100 * each["parts"].get(part, 0) for each in ours]
        right.barh(range(len(ours)), shares, left=begun, label=part, color=colour, height=0.7)
        begun = [one + other for one, other in zip(begun, shares, strict=True)]
    right.set_yticks(range(len(ours)), [_label(each) for each in ours], fontsize=9)
    right.invert_yaxis()
    right.set_xlim(0, 100)
    right.set_title("parts of its step, % of the time", fontsize=11, loc="left")
    right.legend(
        frameon=False, ncols=3, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.08)
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", labelsize=9)
    hardware = report["machine"]
    figure.suptitle(
        f"A training step of a 6-layer, 384-wide BERT on {hardware['processor']}, "
        f"{hardware['threads']} threads, torch {hardware['torch']}",
        fontsize=12,
        x=0.01,
        ha="left",
    )
    figure.savefig(path)
    pyplot.close(figure)
