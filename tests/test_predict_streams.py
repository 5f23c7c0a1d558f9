"""Pipes and devices before and behind kdfast.predict and kdfast.evaluate, as a shell uses them."""

import json
import os
import stat
import subprocess
import sys
import threading

import pytest

from kdfast import predict
from kdfast.demo import TEACHER
from tests import corpora

pytestmark = pytest.mark.program

CONTEXT = "The school in Dornow was founded in 1902. Its head is Anna Weber, and its motto is old."
QUESTION = "Who is the head of the school?"
RECORD = json.dumps({"question": QUESTION, "context": CONTEXT}) + "\n"


def answers(capfd, *flags):
    assert predict.main(["--model", str(TEACHER), *flags]) == 0
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The answers to RECORD twice, from a file."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "in.jsonl").write_text(RECORD * 2)
    flags = ["--data", str(folder / "in.jsonl"), "--output", str(folder / "out.jsonl")]
    assert predict.main(["--model", str(TEACHER), *flags]) == 0
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def pipe_with(text):
    """The reading end of a pipe that holds the text, and ends."""
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    return reading


@pytest.fixture
def stdin():
    """A function that puts a pipe with a text in the place of standard input."""
    before = os.dup(0)
    yield lambda text: os.dup2(pipe_with(text), 0)
    os.dup2(before, 0)


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_standard_input(name, stdin, expected, capfd):
    stdin(RECORD * 2)
    assert answers(capfd, "--data", name) == expected
    squad = {"question": QUESTION, "id": "a"}
    article = {"paragraphs": [{"context": CONTEXT, "qas": [squad, {**squad, "id": "b"}]}]}
    stdin(json.dumps({"data": [article]}, indent=1))
    found = answers(capfd, "--data", name)
    assert found == [{**row, "id": key} for row, key in zip(expected, "ab", strict=True)]
    stdin(CONTEXT)
    asked = ["--question", QUESTION, "--context_file", name]
    assert answers(capfd, *asked) == expected[:1]


def test_process_substitution(expected, capfd):
    """It gives a program /dev/fd/N, the reading end of a pipe."""
    reading = pipe_with(RECORD * 2)
    assert answers(capfd, "--data", f"/dev/fd/{reading}") == expected
    os.close(reading)


def test_an_output_that_is_no_file_is_written_and_not_replaced(expected, tmp_path, capfd):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "in.jsonl").write_text(RECORD * 2)
    read = []
    thread = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    thread.start()
    assert answers(capfd, "--data", str(tmp_path / "in.jsonl"), "--output", str(pipe)) == []
    if stat.S_ISFIFO(pipe.stat().st_mode):
        thread.join()
    assert [json.loads(line) for line in read[0].splitlines()] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "pipe"]
    flags = ["--data", str(tmp_path / "in.jsonl"), "--output", "-"]
    assert answers(capfd, *flags) == expected


def command(program, tmp_path):
    """A program's command line, with more to write than a pipe holds where it can."""
    if program == "predict":
        data = tmp_path / "in.jsonl"
        asked = {"question": QUESTION, "context": "Anna Weber."}
        lines = [json.dumps({"id": letter * 70_000, **asked}) for letter in "abc"]
        data.write_text("\n".join(lines))
    else:
        data = corpora.write(tmp_path / "dev.json", 2)
    flags = ["--model", str(TEACHER), "--data", str(data)]
    if program == "evaluate":
        flags += ["--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "out")]
    return [sys.executable, "-m", f"kdfast.{program}", *flags]


@pytest.mark.parametrize("program", ["predict", "evaluate"])
def test_a_reader_that_has_enough(program, tmp_path):
    with (
        (tmp_path / "err").open("w") as err,
        subprocess.Popen(command(program, tmp_path), stdout=subprocess.PIPE, stderr=err) as run,
    ):
        if program == "predict":
            assert run.stdout.read(10) == b'{"id": "aa'
        run.stdout.close()
        assert run.wait() == 141  # 128 + SIGPIPE, as of any program in a pipeline
    said = (tmp_path / "err").read_text()
    assert "Traceback" not in said and "error" not in said
    if program == "evaluate":
        assert (tmp_path / "out" / "metrics.json").is_file()


@pytest.mark.parametrize("program", ["predict", "evaluate"])
def test_a_full_disk_behind_standard_output(program, tmp_path):
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            command(program, tmp_path), stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("error: standard output cannot be written (No")
    if program == "evaluate":
        assert (tmp_path / "out" / "metrics.json").is_file()


def test_a_full_disk_behind_output(tmp_path, capfd):
    if not stat.S_ISCHR(os.stat("/dev/full").st_mode):
        pytest.skip("/dev/full is no device here")
    (tmp_path / "in.jsonl").write_text(RECORD)
    (tmp_path / "full").symlink_to("/dev/full")  # what a fault would replace
    flags = ["--data", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "full")]
    assert predict.main(["--model", str(TEACHER), *flags]) == 2
    assert "The answers cannot be written (No space left" in capfd.readouterr().err
    assert (tmp_path / "full").is_symlink()
