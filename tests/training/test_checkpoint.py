import errno
import json
import os
import subprocess

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kdfast.common import heartbeat
from kdfast.common.errors import UserError
from kdfast.training import checkpoint, run_folder
from kdfast.training.assemble import Progress

IDENTITY = {"seed": 1, "windows": "abc"}


def save(run, folder, steps, identity=IDENTITY, limit=2):
    run.training.run.output = folder
    run.training.progress = Progress(steps=steps, best_f1=50.0)
    return checkpoint.save_checkpoint(run.training, run.loaded.tokenizer, identity, limit)


def train(run, first, last):
    return [run.step(step, np.arange(step, step + 8)) for step in range(first, last)]


def state_of(run):
    tensors = dict(run.model.named_parameters())
    for name, parameter in list(tensors.items()):
        for key, value in run.optimizer.adamw.state[parameter].items():
            tensors[f"{name}|{key}"] = value
    return tensors


def test_overflows_in_a_row_go_on_being_counted(setup, tmp_path):
    run = setup(precision="fp16")
    train(run, 0, 2)
    run.optimizer.overflows = 7
    resumed = setup(precision="fp16")
    checkpoint.load_checkpoint(save(run, tmp_path, 2), resumed.model, resumed.optimizer)
    assert resumed.optimizer.overflows == 7


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(setup, tmp_path, precision):
    whole = setup(precision=precision, dropout=0.1)
    train(whole, 0, 3)
    if precision == "fp16":  # so that the scaler's state matters: the next steps overflow
        scaler = whole.optimizer.scaler
        scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**24})
    folder = save(whole, tmp_path, 3)
    wanted = train(whole, 3, 7)

    resumed = setup(precision=precision, dropout=0.1)
    torch.rand(5)
    progress, policy = checkpoint.load_checkpoint(folder, resumed.model, resumed.optimizer)
    assert progress == Progress(steps=3, best_f1=50.0)
    assert policy == whole.training.cuts.policy
    assert str(train(resumed, 3, 7)) == str(wanted)  # as text, for the norms that are NaN
    assert (precision == "fp16") == any(report.skipped for report in wanted)
    ours, theirs = state_of(resumed), state_of(whole)
    assert ours.keys() == theirs.keys() and any("exp_avg_sq" in name for name in ours)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert resumed.optimizer.updates == whole.optimizer.updates
    if precision == "fp16":
        assert resumed.optimizer.scaler.state_dict() == whole.optimizer.scaler.state_dict()


def test_a_rank_has_an_hour_for_a_checkpoint(setup, tmp_path, monkeypatch):
    """The other ranks wait while it writes one, reads it, or deletes those of an earlier run."""
    own = heartbeat.Progress()
    monkeypatch.setattr(heartbeat, "_own", own)
    run = setup()
    train(run, 0, 1)

    def told(work, *args):
        heartbeat.report("the end of step 1")
        result = work(*args)
        return own.what, own.patience, result

    *writing, folder = told(save, run, tmp_path, 1)
    assert writing == [f"writing {folder}.new", heartbeat.LONG]
    *reading, fault = told(checkpoint.torn, folder)
    assert reading == [f"the sums of {folder}", heartbeat.LONG] and fault is None
    *loading, _ = told(checkpoint.load_checkpoint, folder, run.model, run.optimizer)
    assert loading == [f"loading {folder}", heartbeat.LONG]
    *deleting, _ = told(run_folder.remove_run, tmp_path)
    assert deleting == [f"deleting the earlier run in {tmp_path}", heartbeat.LONG]


def test_only_the_last_ones_are_kept(setup, tmp_path):
    run = setup()
    for steps in (2, 9, 10, 11):
        save(run, tmp_path, steps)
    names = [path.name for path in checkpoint.list_checkpoints(tmp_path)]
    assert names == ["checkpoint-10", "checkpoint-11"]
    assert sorted(path.name for path in tmp_path.glob("checkpoint*")) == names
    assert checkpoint.find_checkpoint("last", tmp_path)[0].name == "checkpoint-11"


def test_one_that_is_being_deleted_is_none_any_more(setup, tmp_path, monkeypatch):
    run = setup()
    for steps in (2, 9):
        save(run, tmp_path, steps)

    def killed(path):
        if path.name != "checkpoint-2.old":
            return
        (path / checkpoint.STATE_FILE).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "remove", killed)
        with pytest.raises(KeyboardInterrupt):
            save(run, tmp_path, 10)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)][-2:] == [
        "checkpoint-9",
        "checkpoint-10",
    ]
    checkpoint.remove_leftovers(tmp_path)
    assert len(list(tmp_path.glob("checkpoint*"))) == 2


def test_a_checkpoint_holds_no_pickle(setup, tmp_path):
    run = setup()
    train(run, 0, 1)
    folder = save(run, tmp_path, 1)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ""}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    assert (
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder).returncode
        == 0
    )


def test_torn_or_absent_checkpoints_are_named(setup, tmp_path):
    run = setup()
    train(run, 0, 1)
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.find_checkpoint("last", tmp_path)
    with pytest.raises(UserError, match=r"trainer_state.json"):
        checkpoint.load_checkpoint(tmp_path, run.model, run.optimizer)
    folder = save(run, tmp_path, 1)
    for name in ("model.safetensors", "optimizer.safetensors"):
        folder = save(run, tmp_path, 1)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match="cannot be read"):
            checkpoint.load_checkpoint(folder, run.model, run.optimizer)


def test_a_full_disk_leaves_the_earlier_checkpoint(setup, tmp_path, monkeypatch):
    run = setup()

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", full)
        with pytest.raises(UserError, match=r"disk is full.*: free some space\.$"):
            save(run, tmp_path, 1)
    first = save(run, tmp_path, 1)
    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(UserError, match=r"disk is full.* last, which is checkpoint-1"):
        save(run, tmp_path, 2)
    monkeypatch.undo()
    assert checkpoint.find_checkpoint("last", tmp_path) == (first, [])
    assert json.loads((first / "trainer_state.json").read_text())["progress"]["steps"] == 1
    assert save(run, tmp_path, 2) == checkpoint.find_checkpoint("last", tmp_path)[0]


def test_an_incomplete_optimizer_or_state_is_refused(setup, tmp_path):
    run = setup()
    train(run, 0, 1)
    for kept in (0, 4):
        folder = save(run, tmp_path, 1)
        tensors = load_file(folder / "optimizer.safetensors")
        save_file(dict(list(tensors.items())[:kept]), folder / "optimizer.safetensors")
        with pytest.raises(UserError, match="cannot be read"):
            checkpoint.load_checkpoint(folder, run.model, run.optimizer)
    (folder / "trainer_state.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="holds no trainer_state"):
        checkpoint.load_checkpoint(folder, run.model, run.optimizer)
