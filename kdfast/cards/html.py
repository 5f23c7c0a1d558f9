"""report.html: a run's progress, pictures and worst questions in one page without outer parts."""

import base64
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from kdfast.cards import card_text
from kdfast.cards.run_files import RunFiles
from kdfast.data.examples import Example, Place, locate
from kdfast.data.read import read_examples

REPORT_FILE = "report.html"
TEMPLATES = Path(__file__).parent / "templates"
# Questions in the page, which a browser must bear.
WRONG_SHOWN = 400
RIGHT_SHOWN = 100
# Characters of context without a mark that are shown in full, and of each end of a longer one.
UNMARKED = 3000
END = 1000


def write(files: RunFiles, plots: Mapping[str, str]) -> Path:
    """Write report.html into the run's folder; returns its path.

    plots: picture, relative to the folder -> caption. The questions are those of the run's own
    validation data, where eval/ has the answers. Whatever text they hold stays text.
    """
    source = files.config["validation_file"]
    result = files.result_of(source)
    lines = files.questions(result) if result else {}
    questions = questions_of(lines, read_examples(source, split="validation") if lines else [])
    path = files.folder / REPORT_FILE
    script, style = ((TEMPLATES / f"report.{end}").read_text("utf-8") for end in ("js", "css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html").render(
        title=files.name,
        summary=card_text.summary(files).replace("`", ""),
        facts=facts(files, result),
        evaluations=files.evaluations,
        pictures={caption: data_uri(files.folder / name) for name, caption in plots.items()},
        questions=questions,
        shown_of=f"{len(questions)} of {len(lines)} questions.",
        other=files.other(result) if result else None,
        style=Markup(style),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
    )
    # A lone surrogate, which JSON can hold, has no UTF-8.
    path.write_bytes(page.encode("utf-8", "xmlcharrefreplace"))
    return path


def facts(files: RunFiles, result: Mapping[str, Any] | None) -> dict[str, str]:
    """Name -> what the result files say of the run."""
    run, speed = files.run, files.run.get("train_speed")
    found = {
        "Steps": f"{run['steps']}, {run['updates']} of them updates",
        "Windows": str(run["train_windows"]),
        "Hardware": f"{card_text.device_of(run)}, precision {run['precision']}",
    }
    if speed:
        found["Throughput"] = f"{speed['windows_per_second']:.1f} windows/s"
        found["Padding"] = f"{100 * speed['padding_share']:.1f} % of the tokens computed"
    figures = [("This model", files.metrics())]
    if result:
        figures = [("This model", result["metrics"])]
        if "compared" in result:
            figures.append((files.other(result).capitalize(), result["compared"]["metrics"]))
    for name, metrics in figures:
        if metrics:
            data = files.source(files.config["validation_file"]).name
            found[f"{name} on {data}"] = f"EM {metrics['exact']:.2f}, F1 {metrics['f1']:.2f}"
    return found


def data_uri(path: Path) -> str:
    """A PNG file as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def questions_of(
    lines: Mapping[str, Mapping[str, Any]], examples: Sequence[Example]
) -> list[dict[str, Any]]:
    """What the page shows of the questions, worst first; at most WRONG_SHOWN and RIGHT_SHOWN.

    lines: question id -> what the models made of it, as kdfast.evaluate wrote it.
    """
    by_id = {each.id: each for each in examples}

    def badness(key: str) -> tuple[float, float]:
        line = lines[key]
        return line["f1"], -line.get("compared", line)["f1"]

    ordered = sorted((key for key in lines if key in by_id), key=badness)
    wrong = [key for key in ordered if lines[key]["exact"] < 1]
    right = [key for key in ordered if lines[key]["exact"] == 1]
    chosen = wrong[:WRONG_SHOWN] + right[:RIGHT_SHOWN]
    return [_shown(by_id[key], lines[key]) for key in chosen]


def _shown(example: Example, line: Mapping[str, Any]) -> dict[str, Any]:
    places = [locate(example.context, each) for each in example.answers or ()]
    gold = [(place.start, place.end) for place in places if isinstance(place, Place)]
    spans = [(start, end, "gold") for start, end in gold]
    models = {"own": line} | ({"other": line["compared"]} if "compared" in line else {})
    for role, each in models.items():
        if place := find(example.context, each["answer"], gold):
            spans.append((*place, role))
    return {
        "question": example.question,
        "gold": list(dict.fromkeys(each.text for each in example.answers or ())),
        "pieces": pieces(example.context, spans),
        **{
            role: {
                "answer": each["answer"],
                "f1": each["f1"],
                "verdict": "right" if each["exact"] == 1 else "wrong",
            }
            for role, each in models.items()
        },
    }


def find(context: str, answer: str, gold: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Where an answer stands: the place that meets one in `gold`, else the first; None: nowhere."""
    if not answer:
        return None
    first = start = context.find(answer)
    while start >= 0:
        if any(start < high and low < start + len(answer) for low, high in gold):
            break
        start = context.find(answer, start + 1)
    start = first if start < 0 else start
    return None if start < 0 else (start, start + len(answer))


def pieces(context: str, spans: Sequence[tuple[int, int, str]]) -> list[dict[str, str]]:
    """The context cut where a mark begins or ends; `marks` of a piece are the names on all of it.

    spans: start, end, name. A long piece without marks is shortened to its ends.
    """
    cuts = sorted({0, len(context), *(place for span in spans for place in span[:2])})
    found = []
    for low, high in itertools.pairwise(cuts):
        marks = {name for start, end, name in spans if start <= low and high <= end}
        text = context[low:high]
        if not marks and len(text) > UNMARKED:
            text = f"{text[:END]} […] {text[-END:]}"
        found.append({"text": text, "marks": " ".join(sorted(marks))})
    return found
