"""Lines on a terminal: one function prints them, and none of their text steers it."""

import ast
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

import kdfast
from kdfast.common.errors import printable
from kdfast.common.program import Stream
from kdfast.common.progress import passing_bar, print_line

PACKAGE = Path(kdfast.__file__).parent
# Below a program's Stream, which escapes: results of many lines, and the last words of a program.
PRINTS = {
    "command_line.py",
    "demo/demo.py",
    "evaluate.py",
    "common/program.py",
    "common/heartbeat.py",  # from a thread, which must not wait for the bars' lock
    "models/conversion.py",  # a process whose standard error the one that started it reads
}


def calls():
    """(file, what is called, as source) of every call in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path.relative_to(PACKAGE).as_posix(), ast.unparse(node.func)


def test_lines_are_printed_in_one_place():
    found = list(calls())
    assert {file for file, called in found if called == "print"} == PRINTS
    ends = (".write", ".writelines")
    streams = ("sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__", "tqdm", "bar")
    direct = {s + end for s in streams for end in ends}
    assert {file for file, called in found if called in direct} == {"common/progress.py"}
    assert {file for file, called in found if called == "tqdm"} == {"common/progress.py"}
    assert {file for file, called in found if called == "os.write"} == {"common/signals.py"}


EVIL = "a\x1b[2J\r\n\x9b\u202e\u2028\ud800\x7f桥 é"


def test_printable_keeps_what_a_json_text_says():
    text = json.dumps({"id": EVIL}, ensure_ascii=False)
    assert printable(text).isprintable() and json.loads(printable(text)) == {"id": EVIL}
    assert printable("桥 é x") == "桥 é x" and printable("a\nb\t", kept="\n") == "a\nb\\t"


def test_a_line_is_one_line(capsys):
    print_line(f"question {EVIL}")
    print_line(EVIL, sys.stderr)
    out, err = capsys.readouterr()
    assert out == printable(f"question {EVIL}") + "\n" and err == printable(EVIL) + "\n"


@pytest.mark.parametrize(
    "written, shown",
    [
        ("a\x1b[2Jb\rc\n", "a\\u001b[2Jb\\rc\n"),
        ("\rtrain 2/4 \x1b[2J\r", "\rtrain 2/4 \\u001b[2J\\r"),  # a bar, with a hostile text
        ("\n\n\x1b[A\x1b[A", "\n\n\x1b[A\x1b[A"),  # how a second bar is reached
        ("\x1b[A\x1b[Ax", "\\u001b[A\\u001b[Ax"),
        ("\r", "\r"),
    ],
)
def test_a_stream_of_a_program(written, shown):
    text = io.StringIO()
    assert Stream(text, False).write(written) == len(written)
    assert text.getvalue() == shown


def test_a_bar_of_a_hostile_name(monkeypatch):
    shown = io.StringIO()
    shown.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", shown)
    with passing_bar(EVIL, "window", 2) as bar:
        bar.update(1)
    assert printable(EVIL) in shown.getvalue()
    assert printable(shown.getvalue(), kept="\r\n").count("\\u") == printable(EVIL).count("\\u")


@pytest.mark.program
def test_a_terminal_of_few_characters():
    """Where standard output is no UTF-8, what it lacks is escaped, and no program fails."""
    code = "from kdfast.common import program as p; p.run(str, print, ['x … é 桥', EVIL])"
    done = subprocess.run(
        [sys.executable, "-c", code.replace("EVIL", "'y'")],
        env={"PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"['x \\u2026 \\u00e9 \\u6865', 'y']\n"
