"""`make gpu`: the tests and benchmarks that wait for a card, one record of them, and docs/speed.md.

What the person who has the card commits are that record, gpu_<card>.json, and docs/speed.md.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import torch

from . import records

SPEED = records.HERE.parent / "docs" / "speed.md"
# What stands between these is written by this file.
BEGIN, END = "<!-- from benchmarks/gpu_*.json, by `make gpu` -->", "<!-- end -->"
# Windows of squad2_train.json a second, roberta-base, batch 80, on paper: docs/speed.md says how.
# The card, its step, the figure, and the candidate whose figure stands beside it.
PAPER = (
    ("V100", "padded to 384", 191, "padded to 384"),
    ("V100", "micro-batches of like lengths, padded", 348, "kdfast, padded"),
    ("V100", "packed", 406, "kdfast, packed"),
    ("V100", "packed, elementwise operations fused", 526, None),
    ("H100", "micro-batches of like lengths, padded", 1620, "kdfast, padded"),
    ("H100", "packed", 1920, "kdfast, packed"),
    ("H100", "packed, fused, read one step late", 2790, None),
)


def main() -> int:
    if not torch.cuda.is_available():
        print(
            "make gpu: torch finds no CUDA device here: docs/v100.md says how to install torch for "
            "a card.",
            file=sys.stderr,
        )
        return 1
    tests = run_tests()
    timed = pytest("benchmarks/", "--benchmark", "--device", "cuda")
    found = records.machine("cuda") | {"command": "make gpu"}
    print(records.add_to_card(found, {"tests": tests}))
    SPEED.write_text(document(SPEED.read_text(encoding="utf-8"), load()), encoding="utf-8")
    print(f"written: {SPEED}")
    for name in tests["failed"]:
        print(f"failed: {name}")
    return int(timed != 0 or bool(tests["failed"]) or not tests["passed"])


def pytest(*arguments: str) -> int:
    command = [sys.executable, "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=records.HERE.parent).returncode


def run_tests() -> dict:
    """How many of the tests marked `gpu` passed and were skipped, and the names of the others."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tests.xml"
        status = pytest("-m", "gpu", f"--junitxml={path}")
        cases = list(ElementTree.parse(path).iter("testcase")) if path.is_file() else []
    results: dict = {"passed": 0, "skipped": 0, "failed": [] if cases else [f"pytest: {status}"]}
    for case in cases:
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            results["failed"].append(f"{case.get('classname')}.{case.get('name')}")
        else:
            results["skipped" if "skipped" in kinds else "passed"] += 1
    return results


def load(folder: Path = records.HERE) -> list[dict]:
    """The records of all cards."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("gpu_*.json"))]


def document(text: str, cards: list[dict]) -> str:
    """docs/speed.md with the figures of these records."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = paper(cards)
    if not cards:
        lines += ["", "Nothing has been measured on a GPU yet: the last column is empty."]
    for each in cards:
        lines += ["", *card(each)]
    return "\n".join([before + BEGIN, "", *lines, "", END + after])


def paper(cards: list[dict]) -> list[str]:
    """The paper's figures, and next to each the one that was measured on such a card."""
    rows = []
    for name, step, figure, candidate in PAPER:
        measured = [
            f"{row['windows_per_second']:,.0f}"
            for each in cards
            for row in each.get("train_step", ())
            if re.search(rf"\b{name}\b", each["machine"]["card"])
            and (row["model"], row["candidate"]) == ("roberta-base", candidate)
        ]
        built = "" if candidate else "not built"
        rows.append((name, step, f"{figure:,}", ", ".join(measured) or built))
    return table("| card | step | paper, windows/s | measured, windows/s |", "llrr", rows)


def card(record: dict) -> list[str]:
    """All tables of one card."""
    machine, tests = record["machine"], record.get("tests")
    names = ("driver", "CUDA", "torch", "triton", "transformers", "commit", "command", "date")
    lines = [
        f"### {machine['card']}",
        "",
        f"{machine['capability']}, {machine['memory']}; "
        + ", ".join(f"{name} {machine[name]}" for name in names),
    ]
    if tests:
        lines[-1] += (
            f". Tests marked `gpu`: {tests['passed']} passed, {len(tests['failed'])} failed, "
            f"{tests['skipped']} skipped"
        )
    lines[-1] += "."
    for name, make in (
        ("train_step", train_step),
        ("teacher_pass", teacher_pass),
        ("kd_loss", kd_loss),
    ):
        if record.get(name):
            lines += ["", *make(record[name])]
    return lines


def train_step(rows: list[dict]) -> list[str]:
    packed = {row["model"]: row for row in rows if row["candidate"] == "kdfast, packed"}
    head = "| reader | candidate | windows/s | padding | of products | of data sheet | memory | x |"
    cells = [
        (
            f"{row['model']}, {row['precision']}, {row['batch']}",
            row["candidate"],
            f"{row['windows_per_second']:,.1f}",
            percent(row["padding"]),
            percent(row["share_of_peak"]),
            percent(row["share_of_data_sheet"]),
            gigabytes(row.get("peak_memory")),
            f"{packed[row['model']]['tokens_per_second'] / row['tokens_per_second']:.2f}",
        )
        for row in rows
    ]
    return table(head, "llrrrrrr", cells)


def teacher_pass(rows: list[dict]) -> list[str]:
    head = "| teacher | its pass | windows/s | of products | memory |"
    cells = [
        (
            row["model"],
            row["pass"],
            f"{row['windows_per_second']:,.1f}",
            percent(row["share_of_peak"]),
            gigabytes(row.get("peak_memory")),
        )
        for row in rows
    ]
    return table(head, "llrrr", cells)


def kd_loss(rows: list[dict]) -> list[str]:
    head = "| loss, us | backend | kdfast | rows | eager | compile | copy | x eager | x compile |"
    cells = [
        (
            f"{row['shape'][0]} x {row['shape'][1]}, {row['dtype']}",
            row["backend"],
            *(f"{row[name]:,.0f}" for name in ("kdfast", "rows", "eager", "compile", "copy")),
            f"{row['eager'] / row['kdfast']:.1f}",
            f"{row['compile'] / row['kdfast']:.1f}",
        )
        for row in rows
        if row["form"] == "interleaved"
    ]
    return table(head, "llrrrrrrr", cells)


def table(head: str, sides: str, rows: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table; a letter of sides for each column, l or r."""
    rule = "|".join({"l": ":--", "r": "--:"}[side] for side in sides)
    return [head, f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)]


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
