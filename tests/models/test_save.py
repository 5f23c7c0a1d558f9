"""How models are written: the other ranks of a run wait for it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from kdfast.common import heartbeat
from kdfast.models import save


@pytest.fixture
def long_work(monkeypatch):
    """Called with a folder it makes it, and asserts that this takes an hour before a rank hangs."""
    monkeypatch.setattr(heartbeat, "_own", heartbeat.Progress())
    heartbeat.report("the end of step 7")
    folders = []

    def work(*paths):
        assert heartbeat._own.patience == heartbeat.LONG and heartbeat._own.what != "the start"
        folders.append(Path(paths[-1]))
        folders[-1].mkdir(parents=True, exist_ok=True)

    work.folders = folders
    return work


@pytest.mark.parametrize("write", [save.save_model, save.replace_model, save.place_model])
def test_a_rank_that_writes_a_model_has_an_hour(tmp_path, long_work, write):
    slow = SimpleNamespace(save_pretrained=long_work)
    write(tmp_path / "best", SimpleNamespace(reader=slow), slow)
    assert len(long_work.folders) == 2  # the model's and the tokenizer's
    assert heartbeat._own.what == f"writing {long_work.folders[0]}"


def test_a_rank_that_copies_a_model_has_an_hour(tmp_path, long_work, monkeypatch):
    monkeypatch.setattr(save.shutil, "copytree", long_work)
    save.place_copy(tmp_path / "best", tmp_path)
    assert long_work.folders == [tmp_path / "model.new"]
    assert heartbeat._own.what == f"copying {tmp_path / 'best'}"
