"""The program with several ranks, as torchrun starts them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from kdfast import train
from kdfast.teachers import teacher_pass
from tests import forks
from tests.programs import log_of, ranks_of

NO_DROPOUT = {"embeds_dropout_prob": 0.0, "eval_steps": 3, "save_steps": 3}


@pytest.fixture
def still(world):
    """The world with a student without dropout."""
    for name in ("student", "teacher"):
        path = world.path / name / "config.json"
        config = json.loads(path.read_text())
        config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        path.write_text(json.dumps(config))
    return world


def test_two_ranks_learn_what_one_learns(still):
    assert still.run(**NO_DROPOUT) == 0
    alone = still.path / "alone"
    still.output.rename(alone)
    shutil.rmtree(still.path / "cache")
    statuses, said = ranks_of(still, 2, **NO_DROPOUT)
    assert statuses == [0, 0]
    assert "one of 2 ranks" in said[0] and "kdfast.train on" not in said[1]
    assert json.loads((still.output / "run.json").read_text())["ranks"] == 2
    for ours, theirs in zip(log_of(still.output), log_of(alone), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"padded_tokens", "micro_batches", "loss_scale"}:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-6), name


def test_a_run_goes_on_with_another_number_of_ranks(still):
    flags = {**NO_DROPOUT, "save_total_limit": 5}
    assert still.run(**flags) == 0
    whole = log_of(still.output)
    shutil.rmtree(still.output / "checkpoint-6")
    statuses, said = ranks_of(still, 3, **flags, resume_from_checkpoint="last")
    assert statuses == [0, 0, 0] and "after step 3" in said[0]
    for ours, theirs in zip(log_of(still.output), whole, strict=True):
        name = "loss" if "loss" in ours else "f1"
        assert ours[name] == pytest.approx(theirs[name], rel=2e-3)


def test_every_rank_starts_from_the_same_bits_and_ends_there(world):
    statuses, _ = ranks_of(world, 2, max_steps=3)
    assert statuses == [0, 0]
    first = load_file(world.output / "model.safetensors")
    shutil.rmtree(world.output)
    assert ranks_of(world, 2, max_steps=3)[0] == [0, 0]
    again = load_file(world.output / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_more_ranks_than_windows_in_fp16(world):
    flags = {"train_batch_size": 3, "mixed_precision": "fp16", "max_steps": 2}
    assert ranks_of(world, 4, **flags)[0] == [0] * 4


def test_a_mistake_is_said_once(world):
    statuses, said = ranks_of(world, 2, temperature=-1)
    assert statuses == [2, 2]
    assert sorted(text.count("error: --temperature is -1.0") for text in said) == [0, 1]


def test_a_rank_with_other_settings_is_named(world):
    def rank(number):
        said = (world.path / f"said{number}").open("w")
        sys.stderr, sys.stdout = said, said
        status = train.main(world.flags(seed=number))
        said.close()
        return status

    assert forks.run(2, rank) == [2, 2]
    said = [(world.path / f"said{n}").read_text() for n in range(2)]
    assert "".join(said).count("Rank 1 differs from rank 0 in its settings") == 1


def test_a_teacher_that_fails_at_one_rank_ends_all(world, monkeypatch):
    check = teacher_pass._check_finite

    def fails(half, windows, indices):
        if 5 in indices:
            half[:] = float("nan")
        check(half, windows, indices)

    monkeypatch.setattr(teacher_pass, "_check_finite", fails)
    statuses, said = ranks_of(world, 2)
    assert statuses == [2, 2]
    assert "not finite in fp16 for question" in said[0] and "not finite in fp16" in said[1]
    assert sum("because rank" in text for text in said) == 1


def torchrun(count, world, fault, *options, **flags):
    """torchrun of tests.faulty_rank at `count` ranks, and the file with all that it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)]
    if "--master_port" not in options:
        options += "--master_port", str(forks.free_port())
    command += [*options, "-m", "tests.faulty_rank", *map(str, fault), *world.flags(**flags)]
    file = world.path / f"said{len(list(world.path.iterdir()))}"
    with file.open("w") as said:
        return subprocess.Popen(command, stdout=said, stderr=said), file


def test_a_stopped_rank_under_torchrun_ends_the_others(world):
    started, file = torchrun(4, world, ("SIGSTOP", 2, 2, 6))
    sentence = "error: Rank (.) stops, because rank 2 hangs, or its machine is out of reach"
    named = []
    while started.poll() is None and len(named) < 3:
        time.sleep(0.1)
        named = re.findall(sentence, file.read_text())
    assert sorted(named) == ["0", "1", "3"], file.read_text()
    os.kill(int(re.search("pid (.*)", file.read_text())[1]), signal.SIGKILL)  # as torchrun would
    assert started.wait(60) != 0


def test_torchrun_restarts_ranks_that_end_with_the_same_bits(world):
    flags = {"save_steps": 2, "max_steps": 5}
    started, file = torchrun(2, world, ("SIGKILL", 1, 2, 600), "--max_restarts", "1", **flags)
    assert started.wait(300) == 0, file.read_text()
    record = json.loads((world.output / "run.json").read_text())
    assert record["ranks"] == 2 and record["starts"] == [0, 2]
    log = log_of(world.output)
    weights = (world.output / "model.safetensors").read_bytes()
    shutil.rmtree(world.output)
    assert ranks_of(world, 2, **flags)[0] == [0, 0]
    assert log_of(world.output) == log
    assert (world.output / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_nodes(world, rendezvous):
    """Two torchruns. With c10d, the one whose rank is killed makes both start their ranks again;
    each counts restarts by itself, so that the other one has counted none."""
    port, flags = forks.free_port(), {"save_steps": 2, "max_steps": 4}
    options = ["--nnodes", "2"]
    if rendezvous == "c10d":
        options += ["--max_restarts", "1", "--rdzv_backend", "c10d", "--rdzv_id", "test"]
        options += ["--rdzv_endpoint", f"localhost:{port}", "--local_addr", "localhost"]
    nodes = []
    for node in range(2):
        own = ["--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", str(port)]
        fault = ("SIGKILL", 1, 2, 600) if rendezvous == "c10d" else ("SIGCONT", 1, 2, 600)
        nodes.append(torchrun(1, world, fault, *options, *own, **flags))
    for started, file in nodes:
        assert started.wait(300) == 0, file.read_text()
    record = json.loads((world.output / "run.json").read_text())
    assert record["ranks"] == 2
    assert record["starts"] == ([0, 2] if rendezvous == "c10d" else [0])
