"""report.html: a run's progress, pictures and worst questions in one page without outer parts."""

import base64
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from kdfast.cards.render import TEMPLATES, render
from kdfast.cards.run_files import Record, RunFiles
from kdfast.common.files import write_text
from kdfast.data.examples import Example, Place, locate
from kdfast.data.read import read_examples

REPORT_FILE = "report.html"
# Questions in the page, which a browser must bear.
WRONG_SHOWN = 400
RIGHT_SHOWN = 100
# Characters of context without a mark that are shown in full, and of each end of a longer one.
UNMARKED = 3000
END = 1000


def write(files: RunFiles, plots: Mapping[str, str]) -> Path:
    """Write report.html into the run's folder.

    The questions are those of the run's own validation data, where eval/ has the answers.

    Args:
        files: The run.
        plots: Picture, relative to the folder -> caption.

    Returns:
        The report's path.
    """
    source = files.config["validation_file"]
    result = files.result_of_validation()
    lines = files.questions(result) if result else {}
    questions = questions_of(lines, read_examples(source, split="validation") if lines else [])
    models = files.models(result) if result else []
    # The only script that the page may run, by its checksum.
    script = (TEMPLATES / "report.js").read_text("utf-8")
    page = render(
        "report.html",
        files=files,
        figures={name: figures["metrics"] for name, _, figures in models}
        or {"this model": files.metrics()},
        validated=files.validated(),
        validation_data=" and ".join(label for label, _ in files.validation_data()),
        pictures={
            text: base64_of((files.folder / name).read_bytes()) for name, text in plots.items()
        },
        questions=questions,
        answered=len(lines),
        other=models[1].name if len(models) > 1 else None,
        script=Markup(script),
        script_sha256=base64_of(hashlib.sha256(script.encode()).digest()),
    )
    path = files.folder / REPORT_FILE
    write_text(path, page)
    return path


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def questions_of(lines: Mapping[str, Record], examples: Sequence[Example]) -> list[Record]:
    """What the page shows of the questions, worst first; at most WRONG_SHOWN and RIGHT_SHOWN.

    Args:
        lines: Question id -> what the models made of it, as kdfast.evaluate wrote it.
        examples: The questions.
    """

    def badness(example: Example) -> tuple[float, float]:
        line = lines[example.id]
        return line["f1"], -line.get("compared", line)["f1"]

    known = sorted((each for each in examples if each.id in lines), key=badness)
    wrong = [each for each in known if lines[each.id]["exact"] < 1]
    right = [each for each in known if lines[each.id]["exact"] == 1]
    chosen = wrong[:WRONG_SHOWN] + right[:RIGHT_SHOWN]
    return [_shown(each, lines[each.id]) for each in chosen]


def _shown(example: Example, line: Record) -> Record:
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
        **models,
    }


def find(context: str, answer: str, gold: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """Where an answer stands: the place that meets one in `gold`, else the first; None: nowhere."""
    starts = [each.start() for each in re.finditer(f"(?={re.escape(answer)})", context)]
    meet = [
        each
        for each in starts
        if any(each < high and low < each + len(answer) for low, high in gold)
    ]
    start = next(iter(meet or starts), None)
    return None if start is None or not answer else (start, start + len(answer))


def pieces(context: str, spans: Sequence[tuple[int, int, str]]) -> list[dict[str, str]]:
    """The context cut where a mark begins or ends; `marks` of a piece are the names on all of it.

    A long piece without marks is shortened to its ends.

    Args:
        context: The text.
        spans: Start, end and name of each mark, in characters.
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
