"""A run whose data do not fit in memory: anonymous memory, bytes on disk, start-up, linear cost.

The program is started as its user starts it, under a limit, on made-up data with one question a
context: the form with the most contexts and the fewest windows for the bytes of one. The teacher
is a stub: one layer, 16 wide, so that what is measured is not a model.
"""

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

from . import records
from .measured_run import Phase, measure_run

SMALL, SIZES = 1_000, (100_000, 1_000_000)
STEPS, BATCH = 100, 32
LIMIT = 2_000_000_000  # bytes of anonymous memory; the models here have under a million
BYTES_PER_TOKEN = 12
TOKENIZER = Path(__file__).parents[1] / "kdfast" / "demo" / "teacher"
FEWEST_WORDS, MOST_WORDS = 40, 160  # of a context, as SQuAD's mostly are

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


@pytest.fixture(autouse=True)
def on_a_cpu(device, quick):
    if device.type != "cpu" or quick:
        pytest.skip("what a run reads and keeps in memory is the same on a GPU")


@dataclass
class Figures:
    """windows: of the set. tokens: real ones. stored: bytes of the caches. phases: those of
    measure_run; "again" is a whole run of one step over caches that are there, from the start of
    the program to its end."""

    windows: int
    tokens: int
    stored: int
    phases: dict[str, Phase]

    @property
    def bytes_per_token(self) -> float:
        return self.stored / self.tokens

    @property
    def anonymous(self) -> int:
        return max(phase.anonymous for phase in self.phases.values())


def write_source(path: Path, windows: int) -> None:
    """Flat records, each of one window; every word is one token of the tokenizer."""
    vocabulary = AutoTokenizer.from_pretrained(TOKENIZER).get_vocab()
    words = np.array(sorted(word for word in vocabulary if word.isalpha()))
    draw = np.random.default_rng(0)
    with path.open("w") as file:
        for number in range(windows):
            chosen = words[draw.integers(len(words), size=draw.integers(FEWEST_WORDS, MOST_WORDS))]
            at = int(draw.integers(len(chosen)))
            record = {
                "id": f"{number:024x}",
                "question": " ".join(words[draw.integers(len(words), size=10)]),
                "context": " ".join(chosen),
                "answers": {
                    "text": [str(chosen[at])],
                    "answer_start": [sum(map(len, chosen[:at])) + at],
                },
            }
            file.write(json.dumps(record) + "\n")


def write_reader(folder: Path, seed: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=16,
        max_position_embeddings=384,
    )
    BertForQuestionAnswering(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def measure(folder: Path, windows: int, steps: int, *, start_again: bool) -> Figures:
    """Prepare, teach and train on `windows` windows and, if start_again, start once more."""
    source, cache = folder / "train.jsonl", folder / "cache"
    write_source(source, windows)
    cache.mkdir()
    arguments = ["--train_file", str(source), "--output_dir", str(folder / "out"), "--overwrite"]
    arguments += ["--teacher", write_reader(folder / "teacher", 1)]
    arguments += ["--student", write_reader(folder / "student", 2)]
    arguments += ["--train_batch_size", str(BATCH)]
    phases = measure_run([*arguments, "--max_steps", str(steps)], cache, LIMIT)
    files = {path: path.stat() for path in cache.rglob("*") if path.is_file()}
    if start_again:
        phases["again"] = measure_run([*arguments, "--max_steps", "1"], cache, LIMIT)["train"]
        assert all(path.stat().st_mtime_ns == stat.st_mtime_ns for path, stat in files.items())
    logits = next(path for path in files if path.name == "logits.npy")
    stored = sum(stat.st_size for stat in files.values())
    return Figures(windows, len(np.load(logits, mmap_mode="r")), stored, phases)


def gate(figures: Figures) -> None:
    assert figures.tokens > figures.windows * FEWEST_WORDS
    assert figures.bytes_per_token <= BYTES_PER_TOKEN
    assert 0 < figures.anonymous < LIMIT


def test_gate(tmp_path):
    gate(measure(tmp_path, SMALL, steps=3, start_again=False))


@pytest.mark.timed
def test_scale(tmp_path, capsys):
    found, results = records.machine("cpu"), []
    for size in SIZES:
        folder = tmp_path / str(size)
        folder.mkdir()
        results.append(measure(folder, size, STEPS, start_again=True))
        shutil.rmtree(folder)
    report = {"machine": found, "results": [asdict(each) for each in results]}
    written = records.write(records.HERE / "scale_cpu.json", report)
    with capsys.disabled():
        lines = [f"{name}: {value}" for name, value in found.items()]
        print("", *lines, *text(results), written, sep="\n")
    for each in results:
        gate(each)


def text(results: list[Figures]) -> list[str]:
    """A table: seconds on the clock, of CPU, and memory at its highest, for each phase."""
    heads = ("windows", "phase", "s", "CPU s", "us/window", "RssAnon MB", "processes")
    lines = ["{:>9}  {:8} {:>7} {:>7} {:>9} {:>10} {:>9}".format(*heads)]
    for each in results:
        done = {"train": STEPS * BATCH, "again": BATCH}
        for name, phase in each.phases.items():
            rate = 1e6 * phase.cpu / done.get(name, each.windows)
            lines.append(
                f"{each.windows:>9}  {name:8} {phase.seconds:7.1f} {phase.cpu:7.1f} {rate:9.0f} "
                f"{phase.anonymous / 1e6:10.0f} {phase.processes:9}"
            )
        lines.append(
            f"{each.windows:>9}  {each.bytes_per_token:.2f} bytes on disk for each of "
            f"{each.tokens / 1e6:.1f} million tokens"
        )
    return lines
