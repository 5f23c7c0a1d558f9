"""Tokenising in other processes: the same bytes, and what is left when one of them dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdfast.errors import UserError
from kdfast.squad import cutting, encoding, features
from kdfast.squad.records import iter_examples
from tests.squad.made_up import SMALL, random_examples, write_source
from tests.tokenizers import of_family


@pytest.fixture
def processes(monkeypatch):
    """Small batches, all encoded in other processes; returns the list of those started."""
    monkeypatch.setattr(cutting, "_BATCH_QUESTIONS", 4)
    monkeypatch.setattr(encoding, "FEW_BATCHES", 1)
    started = []

    class Spied(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(encoding.subprocess, "Popen", Spied)
    return started


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_processes_write_the_same_bytes(tmp_path, processes):
    source = write_source(tmp_path / "source.json", random_examples(3))
    found = []
    for count in (1, 2, 3):
        cache = tmp_path / f"cache{count}"
        w = features.prepare(
            source, of_family("deberta"), cache_dir=cache, processes=count, **SMALL
        )
        found.append(contents(cache / "features" / w.key))
        assert [process.returncode for process in processes] == [-signal.SIGKILL] * len(processes)
        assert len(processes) == (0 if count == 1 else count)
        processes.clear()
    assert found[0] == found[1] == found[2]


def test_results_keep_the_order_of_their_jobs(monkeypatch):
    """However long each takes."""
    monkeypatch.setattr(encoding, "FEW_BATCHES", 0)
    jobs = [(["the Normans " * (2000 if i % 3 == 0 else 1)], [f"{i}"], 9) for i in range(12)]
    tokenizer = of_family("bert")
    expected = encoding.encoder(tokenizer)(iter(jobs))
    for ours, here in zip(encoding.encoder(tokenizer, 3)(iter(jobs)), expected, strict=True):
        for a, b in zip(ours, here, strict=True):
            assert (a.ids.tolist(), a.offsets.tolist()) == (b.ids.tolist(), b.offsets.tolist())


def test_a_killed_process_ends_in_a_sentence(tmp_path, processes, monkeypatch):
    source = write_source(tmp_path / "source.json", random_examples(4))
    cache = tmp_path / "cache"

    def examples(*args, **options):
        for number, example in enumerate(iter_examples(*args, **options)):
            if number == 30:
                os.kill(processes[1].pid, signal.SIGKILL)
            yield example

    arguments = {"cache_dir": cache, "processes": 2, **SMALL}
    with monkeypatch.context() as patch:
        patch.setattr(features, "iter_examples", examples)
        with pytest.raises(UserError, match=r"has ended \(SIGKILL\).*run again"):
            features.prepare(source, of_family("bert"), **arguments)
    assert [p.name for p in (cache / "features").iterdir() if p.suffix != ".lock"] == []
    assert all(process.poll() is not None for process in processes)
    assert len(features.prepare(source, of_family("bert"), **arguments)) > 0


def test_a_process_is_light():
    """It brings no copy of this one, and does not import kdfast, which would bring torch."""
    worker = encoding._Worker(of_family("bert").backend_tokenizer.to_str())
    contexts, questions = worker.encode((["the Normans"], ["who"], 9))
    maps = Path(f"/proc/{worker.process.pid}/maps").read_text()
    worker.end()
    assert len(contexts.ids) and len(questions.ids)
    assert "numpy" in maps and "libtorch" not in maps


def test_processes_end_when_their_starter_is_killed():
    program = (
        "import os\n"
        "from kdfast.squad import encoding\n"
        "from tests.tokenizers import of_family\n"
        "text = of_family('bert').backend_tokenizer.to_str()\n"
        "workers = [encoding._Worker(text) for _ in range(2)]\n"
        "print(*(w.process.pid for w in workers), flush=True)\n"
        "workers[0].encode((['the Normans'], ['who'], 9))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, timeout=120)
    assert done.returncode == -signal.SIGKILL
    for pid in map(int, done.stdout.split()):
        for _ in range(300):
            if not running(pid):
                break
            time.sleep(0.1)
        assert not running(pid)


def running(pid):
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_the_number_of_processes_is_that_of_the_processors_at_hand(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert encoding.processor_count() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert encoding.processor_count() == os.cpu_count()
