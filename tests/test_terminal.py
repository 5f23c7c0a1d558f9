"""Programs as a user meets them: on a terminal of 80 columns, at Ctrl-C, at the end of a pipe."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from kdfast.demo import TEACHER
from tests import corpora, hub
from tests.programs import log_of

pytestmark = pytest.mark.program

PYTHON = sys.executable
SLOW = {"max_steps": 4000, "train_batch_size": 8}  # long enough to be stopped


def command(name, *flags):
    return [PYTHON, "-m", f"kdfast.{name}", *flags]


class Terminal:
    """A process on a terminal of 80 columns; `text` is what it has shown.

    hangs_up: it gets SIGHUP when the terminal is closed.
    """

    def __init__(self, command, hangs_up=False):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=partial(fcntl.ioctl, slave, termios.TIOCSCTTY, 0) if hangs_up else None,
        )
        os.close(slave)
        self.text = ""

    def read_until(self, pattern):
        """Wait for the pattern, or, if None, for the end; returns the exit status or None."""
        with suppress(OSError):  # how a terminal's end is told
            while pattern is None or not re.search(pattern, self.text):
                block = os.read(self.master, 4096)
                if not block:
                    break
                self.text += block.decode(errors="replace")
        if pattern is None:
            os.close(self.master)
            return self.process.wait(60)
        assert re.search(pattern, self.text), self.text


def test_the_bar_has_room_for_what_counts_and_notes_stand_above_it(world):
    terminal = Terminal(command("train", *world.flags(eval_steps=2, max_steps=4)))
    assert terminal.read_until(None) == 0
    shown = re.split(r"[\r\n]+", terminal.text)
    bars = [each for each in shown if each.startswith("train ")]
    assert re.search(r"loss \d+\.\d+ lr \d\.\de-\d\d \d+\.\d windows/s$", bars[-1])
    assert all(len(each) <= 80 for each in bars)
    # Before an evaluation begins, the bar shows all steps that are done.
    before = terminal.text[: terminal.text.index("evaluate:")]
    assert re.findall(r"train (\d)/4", before)[-1] == "2"
    for what in ("features of", "teacher:", "evaluate:"):
        assert what in terminal.text
    # A note begins a line of its own.
    assert any(re.match(r"step 2: exact", each) for each in shown)
    assert "Traceback" not in terminal.text


def test_a_download_from_the_hub_shows_its_bar_on_a_terminal(world, monkeypatch):
    home = world.path / "home"
    with hub.served({"me/it": {"main": Path(world.teacher)}}, {}) as (url, _):
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HOME", str(home / "plain"))
        program = command("evaluate", "--model", "me/it", "--data", world.validation_file)
        program += ["--max_seq_length", "200", "--cache_dir", str(home / "cache")]
        done = subprocess.run(program, capture_output=True, text=True)
        assert done.returncode == 0 and "%|" not in done.stderr
        monkeypatch.setenv("HF_HOME", str(home / "seen"))
        terminal = Terminal(program)
        assert terminal.read_until(None) == 0, terminal.text
    assert re.search(r"(Fetching|Downloading).*%\|", terminal.text)
    assert "Loading weights" not in terminal.text


def test_no_bar_where_there_is_no_terminal(world):
    done = subprocess.run(
        command("train", *world.flags(max_steps=20)), capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    assert "\r" not in done.stdout and "step 20 of 20: loss" in done.stdout


def test_predict_shows_its_bar_on_a_terminal_alone(tmp_path):
    data = corpora.write(tmp_path / "dev.json", 4)
    flags = ["--model", str(TEACHER), "--data", data, "--output", str(tmp_path / "out")]
    terminal = Terminal(command("predict", *flags))
    assert terminal.read_until(None) == 0 and "8/8 questions" in terminal.text
    done = subprocess.run(command("predict", *flags), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Modules whose import has just ended when the interrupt comes, from the first to the last.
MOMENTS = {
    "torch.torch_version": ["train", "prepare", "evaluate", "predict", "card", "doctor"],
    "torch.nn.functional": ["train", "doctor"],
    "transformers.utils.hub": ["train", "evaluate", "predict", "card"],
    "kdfast.models.load": ["train", "prepare", "evaluate", "predict"],
}


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("moment", "name"), [(moment, name) for moment, names in MOMENTS.items() for name in names]
)
def test_an_interrupt_during_imports_shows_no_traceback(moment, name, tmp_path):
    flags = {
        "train": ["--train_file", "x", "--output_dir", str(tmp_path / "o"), "--student", "x/y"],
        "prepare": ["--train_file", "x", "--student", "x/y"],
        "evaluate": ["--model", "x/y", "--data", "x"],
        "predict": ["--model", "x/y", "--question", "q", "--context", "c"],
        "card": ["--model_dir", "x"],
        "doctor": [],
    }[name]
    program = [PYTHON, "-X", "importtime", *command(name, *flags)[1:]]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.split("|")[-1].strip() == moment:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    said = [line for line in rest.splitlines() if not line.startswith("import time:")]
    assert said == [] and process.returncode == 130, rest[-2000:]


def test_the_first_interrupt_of_training_is_answered(world):
    terminal = Terminal(command("train", *world.flags(**SLOW)))
    terminal.read_until(r"train [1-9]\d*/4000")
    os.killpg(terminal.process.pid, signal.SIGINT)
    terminal.read_until("a second one ends it at once")
    assert terminal.read_until(None) == 130
    assert "Traceback" not in terminal.text and "in a checkpoint" in terminal.text
    assert "--resume_from_checkpoint last goes on" in terminal.text


def test_a_run_whose_terminal_is_closed_ends_in_a_checkpoint(world):
    terminal = Terminal(command("train", *world.flags(**SLOW)), hangs_up=True)
    terminal.read_until(r"train [1-9]\d*/4000")
    os.close(terminal.master)
    assert terminal.process.wait(60) == 128 + signal.SIGHUP
    (checkpoint,) = world.output.glob("checkpoint-*")
    steps = int(checkpoint.name.split("-")[1])
    assert len(log_of(world.output)) == steps
    go_on = command("train", *world.flags(**SLOW, resume_from_checkpoint="last"))
    # With SIGHUP ignored, as nohup starts it, a run outlives its terminal.
    ignoring = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh"]
    terminal = Terminal([*ignoring, *go_on], hangs_up=True)
    terminal.read_until(rf"Resumed from .* after step {steps}")
    terminal.read_until(r"train [1-9]\d*/4000")
    os.close(terminal.master)
    written = (world.output / "train_log.jsonl").stat().st_size
    while (world.output / "train_log.jsonl").stat().st_size == written:
        assert terminal.process.poll() is None
        time.sleep(0.05)
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.process.wait(60) == 128 + signal.SIGTERM


def test_no_advice_to_resume_where_there_is_no_checkpoint(world):
    many = corpora.write(world.path / "many.json", 4000)
    terminal = Terminal(command("train", *world.flags(**SLOW, train_file=many)))
    terminal.read_until(r"teacher: +[1-9]")
    os.killpg(terminal.process.pid, signal.SIGINT)
    assert terminal.read_until(None) == 130
    assert "stopped by SIGINT" in terminal.text
    assert "resume_from" not in terminal.text and "Traceback" not in terminal.text


def closed_pipe():
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def unwritable(kind):
    return closed_pipe() if kind == "closed" else os.open("/dev/full", os.O_WRONLY)


KINDS = [
    "closed",
    pytest.param(
        "full",
        marks=pytest.mark.skipif(
            not os.path.exists("/dev/full"), reason="there is no /dev/full here"
        ),
    ),
]


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_training_goes_on_when_nothing_can_be_printed(world, kind, ranks):
    program = command("train", *world.flags(eval_steps=2))
    if ranks > 1:
        program[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    out = unwritable(kind)
    done = subprocess.run(program, stdout=out, stderr=out if ranks == 1 else subprocess.PIPE)
    os.close(out)
    assert done.returncode == 0
    assert [line["step"] for line in log_of(world.output) if "step" in line] == list(range(6))
    assert (world.output / "run.json").is_file() and (world.output / "README.md").is_file()
    if ranks > 1:
        assert b"Traceback" not in done.stderr


def run_against(kind, program):
    out = unwritable(kind)
    done = subprocess.run(program, stdout=out, stderr=subprocess.PIPE, text=True)
    os.close(out)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    if kind == "full":
        assert done.returncode == 2 and "No space left on device" in done.stderr
    else:
        assert done.returncode == 128 + signal.SIGPIPE and "error" not in done.stderr


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", KINDS)
def test_a_result_that_cannot_be_written_ends_a_program_without_a_traceback(tmp_path, kind):
    data, folder = corpora.write(tmp_path / "dev.json", 4), tmp_path / "eval"
    model = ["--model", str(TEACHER), "--data", data]
    run_against(kind, command("predict", *model))
    run_against(kind, command("evaluate", *model, "--output_dir", str(folder)))
    run_against(kind, command("doctor"))
    names = {path.name for path in folder.iterdir()}
    assert {"metrics.json", "predictions.json", "summary.json"} <= names


def test_help_may_be_cut_short():
    done = subprocess.run(command("train", "--help"), stdout=closed_pipe(), stderr=subprocess.PIPE)
    assert done.returncode == 0 and done.stderr == b""


def test_a_program_started_without_streams():
    code = f"exec {PYTHON} -m kdfast.doctor >&- 2>&-"
    assert subprocess.run(["sh", "-c", code]).returncode == 0
