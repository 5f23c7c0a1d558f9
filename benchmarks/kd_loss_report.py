"""What bench_kd_loss.py measured: as text, as JSON, as a picture."""

import itertools
from pathlib import Path

from . import records
from .measure import percentiles

FORMS = {  # baselines of an input in this form: the fastest counts
    "interleaved": ("interleaved", "split"),
    "contiguous": ("contiguous",),
}


def rows_of(cell, taken: dict[str, list]) -> list[dict]:
    """One row for each candidate and step, in microseconds."""
    rows = []
    for name, moments in taken.items():
        steps = {
            "forward": [first for first, _ in moments],
            "backward": [second for _, second in moments],
            "both": [first + second for first, second in moments],
        }
        rows += [
            {
                "candidate": name,
                "step": step,
                "shape": list(cell.shape),
                "dtype": str(cell.dtype)[6:],
                **percentiles(seconds),
                "rounds": len(seconds),
            }
            for step, seconds in steps.items()
        ]
    return rows


def scaling_of(cell, taken: dict[str, list]) -> dict:
    both = {name: percentiles([a + b for a, b in moments]) for name, moments in taken.items()}
    return {"shape": list(cell.shape), "one": both["1"], "two": both["2"]}


class Times:
    """Medians by candidate, for one shape, dtype and step."""

    def __init__(self, times: list[dict], shape, dtype: str, step: str):
        self.rows = {
            row["candidate"]: row
            for row in times
            if (row["shape"], row["dtype"], row["step"]) == (list(shape), dtype, step)
        }

    def median(self, candidate: str) -> float:
        return self.rows[candidate]["p50"]

    def baseline(self, kind: str, form: str) -> float:
        """The fastest of eager's, or of torch.compile's, roads from an input of this form."""
        return min(self.median(f"{kind} {road}") for road in FORMS[form])

    def backends(self) -> list[str]:
        ends = " interleaved rows alone"
        return [name[: -len(ends)] for name in self.rows if name.endswith(ends)]


def groups(report: dict) -> list[tuple[tuple[int, int], str]]:
    return sorted(
        {(tuple(row["shape"]), row["dtype"]) for row in report["times"]},
        key=lambda group: (group[1] != "float32", group[0][1], group[0][0]),
    )


def text(report: dict) -> list[str]:
    """The page that is printed."""
    lines = [f"{name}: {value}" for name, value in report["machine"].items()]
    lines += [
        "",
        "Median microseconds; one thread on a CPU. eager, compile: the faster of the formula on",
        "the tensor and after split and contiguous copies. rows: the backend without autograd.",
        "share: of the speed of a copy that moves the same bytes, reached by the rows alone.",
        "",
        f"{'B x L':>11} {'dtype':<8}{'form':<12}{'step':<9}{'backend':<8}"
        f"{'p20':>9}{'p50':>9}{'p80':>9}{'rows':>9}{'eager':>10}{'compile':>10}{'copy':>9}"
        f"{'x eager':>9}{'x compile':>10}{'share':>7}",
    ]
    for shape, dtype in groups(report):
        for form in FORMS:
            for step in ("forward", "backward", "both"):
                times = Times(report["times"], shape, dtype, step)
                lines += [_line(times, shape, dtype, form, step, name) for name in times.backends()]
    lines += ["", "Python and autograd, of forward and backward through the public function:"]
    for shape, dtype in groups(report):
        times = Times(report["times"], shape, dtype, "both")
        empty = times.median("empty function")
        for name in times.backends():
            whole = times.median(f"{name} interleaved")
            alone = times.median(f"{name} interleaved rows alone")
            lines.append(
                f"{_size(shape):>11} {dtype:<8} {name}: {whole:.0f} us, of which "
                f"{whole - alone:.0f} ({100 * (1 - alone / whole):.0f} %) outside the rows; "
                f"an empty autograd.Function takes {empty:.0f} us"
            )
    lines += ["", "Peak memory beyond inputs and gradient, 80 x 384:"]
    lines += [
        f"  {row['candidate']:<24}{row['dtype']:<8}{row['bytes'] / 1024:>9.1f} KiB"
        for row in report["memory"]
    ]
    if report["threads"]:
        lines += ["", "Rows alone, forward and backward, fp32, on one thread and on two:"]
    for row in report["threads"]:
        one, two = row["one"], row["two"]
        lines.append(
            f"{_size(row['shape']):>11}  {one['p50']:.0f} us and {two['p50']:.0f} us: "
            f"{one['p50'] / two['p50']:.2f}x (p20: {one['p20'] / two['p20']:.2f}x)"
        )
    return lines


def _size(shape) -> str:
    return f"{shape[0]} x {shape[1]}"


def _line(times: Times, shape, dtype: str, form: str, step: str, name: str) -> str:
    ours = times.rows[f"{name} {form}"]
    alone = times.median(f"{name} {form} rows alone")
    eager, compiled = times.baseline("eager", form), times.baseline("compile", form)
    copy = times.median("copy")
    return (
        f"{_size(shape):>11} {dtype:<8}{form:<12}{step:<9}{name:<8}"
        f"{ours['p20']:>9.1f}{ours['p50']:>9.1f}{ours['p80']:>9.1f}{alone:>9.1f}"
        f"{eager:>10.1f}{compiled:>10.1f}{copy:>9.1f}"
        f"{eager / ours['p50']:>8.1f}x{compiled / ours['p50']:>9.1f}x{100 * copy / alone:>6.0f}%"
    )


def summary(report: dict) -> list[dict]:
    """Microseconds of forward and backward, a row for each shape, type, form and backend."""
    rows = []
    for shape, dtype in groups(report):
        times = Times(report["times"], shape, dtype, "both")
        for name, form in itertools.product(times.backends(), FORMS):
            rows.append(
                {
                    "shape": list(shape),
                    "dtype": dtype,
                    "form": form,
                    "backend": name,
                    "kdfast": times.median(f"{name} {form}"),
                    "rows": times.median(f"{name} {form} rows alone"),
                    "eager": times.baseline("eager", form),
                    "compile": times.baseline("compile", form),
                    "copy": times.median("copy"),
                }
            )
    return rows


def write(report: dict) -> list[str]:
    """Write kd_loss_cpu.json and .png next to this file; says what was written."""
    path = records.HERE / "kd_loss_cpu.json"
    return [
        records.write(path, report),
        records.picture(report, path.with_suffix(".png"), draw),
    ]


def draw(report: dict, path: Path) -> None:
    """Speed-up over eager and torch.compile, and the share of the limit, by shape."""
    from matplotlib import pyplot

    shapes = [shape for shape, dtype in groups(report) if dtype == "float32"]
    times = [Times(report["times"], shape, "float32", "both") for shape in shapes]
    name = times[0].backends()[0]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(11, 4.2), dpi=150, width_ratios=[1.7, 1], layout="constrained"
    )
    labels = [f"{batch}×{length}" for batch, length in shapes]
    _bars(
        left,
        labels,
        {
            "PyTorch eager": [
                t.baseline("eager", "interleaved") / t.median(f"{name} interleaved") for t in times
            ],
            "torch.compile": [
                t.baseline("compile", "interleaved") / t.median(f"{name} interleaved")
                for t in times
            ],
        },
        ("#9db4c8", "#1f5f8b"),
        "{:.0f}×",
    )
    left.set_title("times faster, forward + backward, fp32", fontsize=11, loc="left")
    left.legend(frameon=False, title="than", alignment="left", ncols=2, loc="upper left")
    half = [Times(report["times"], shape, "float16", "both") for shape in shapes]
    share = f"{name} interleaved rows alone"
    _bars(
        right,
        labels,
        {
            "fp32": [100 * t.median("copy") / t.median(share) for t in times],
            "fp16": [100 * t.median("copy") / t.median(share) for t in half],
        },
        ("#d08c3c", "#8a4f10"),
        "",
    )
    right.set_title("kernels: % of the speed of a memory copy", fontsize=11, loc="left")
    right.legend(frameon=False, ncols=2, loc="upper left")
    for axes in (left, right):
        axes.set_ylim(0, 1.22 * axes.get_ylim()[1])
    hardware = report["machine"]
    where = hardware.get("card") or f"{hardware['processor']}, one thread"
    figure.suptitle(
        f"kdfast.fused_kd_loss on {where}, torch {hardware['torch']} (windows × positions)",
        fontsize=12,
        x=0.01,
        ha="left",
    )
    figure.savefig(path)
    pyplot.close(figure)


def _bars(axes, labels: list[str], series: dict[str, list[float]], colours, form: str) -> None:
    width = 0.8 / len(series)
    for number, ((name, values), colour) in enumerate(zip(series.items(), colours, strict=True)):
        places = [i + (number - (len(series) - 1) / 2) * width for i in range(len(labels))]
        bars = axes.bar(places, values, width, label=name, color=colour)
        if form:
            axes.bar_label(bars, [form.format(value) for value in values], fontsize=8, padding=1)
    axes.set_xticks(range(len(labels)), labels, rotation=40, ha="right", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=9)
