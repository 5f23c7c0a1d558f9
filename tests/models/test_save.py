"""How models are written: the other ranks of a run wait for it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from kdfast.common import heartbeat
from kdfast.common.errors import UserError
from kdfast.models import save
from kdfast.training.assemble import Progress
from kdfast.training.checkpoint import save_checkpoint


@pytest.fixture
def long_work(monkeypatch):
    """Called with a folder it makes it, and asserts that this takes an hour before a rank hangs."""
    monkeypatch.setattr(heartbeat, "_own", heartbeat.Progress())
    heartbeat.report("the end of step 7")
    folders = []

    def work(*paths, **others):
        assert heartbeat._own.patience == heartbeat.LONG and heartbeat._own.what != "the start"
        folders.append(Path(paths[-1]))
        folders[-1].mkdir(parents=True, exist_ok=True)

    work.folders = folders
    return work


@pytest.mark.parametrize("write", [save.save_model, save.replace_model, save.place_model])
def test_a_rank_that_writes_a_model_has_an_hour(tmp_path, long_work, write):
    slow = SimpleNamespace(save_pretrained=long_work)
    model = SimpleNamespace(reader=slow, named_parameters=nn.Linear(1, 1).named_parameters)
    write(tmp_path / "best", model, slow)
    assert len(long_work.folders) == 2  # the model's and the tokenizer's
    assert heartbeat._own.what == f"writing {long_work.folders[0]}"


@pytest.mark.parametrize("write", ["replace_model", "place_model", "save_checkpoint"])
def test_weights_that_are_not_finite_are_not_written(setup, tmp_path, write):
    run = setup()
    run.step(0, np.arange(3))
    run.training.run.output = tmp_path
    best = tmp_path / "best"

    def written():
        if write == "save_checkpoint":
            run.training.progress = Progress(steps=1)
            return save_checkpoint(run.training, run.loaded.tokenizer, {}, 1)
        folder = best if write == "replace_model" else tmp_path
        return getattr(save, write)(folder, run.model, run.loaded.tokenizer)

    written()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    assert before
    with torch.no_grad():
        run.model.reader.qa_outputs.weight[1, 2] = torch.inf
    with pytest.raises(
        UserError, match=r"not finite \(reader\.qa_outputs\.weight\) and are not saved"
    ):
        written()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.*") if p.is_file()} == before


def test_a_rank_that_copies_a_model_has_an_hour(tmp_path, long_work, monkeypatch):
    monkeypatch.setattr(save, "copy_files", long_work)
    save.place_copy(tmp_path / "best", tmp_path)
    assert long_work.folders == [tmp_path / "model.new"]
    assert heartbeat._own.what == f"copying {tmp_path / 'best'}"
