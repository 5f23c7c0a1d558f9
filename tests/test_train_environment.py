"""A run that goes on in another place, or whose log has lost lines: what it says of that."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from kdfast.common.files import write_sums

FLAGS = {"max_steps": 4, "save_steps": 2, "validation_file": None}


@pytest.fixture
def goes_on(world, capsys):
    """A function that edits a copy of a run of two steps, goes on, and returns what is printed."""
    assert world.run(**FLAGS) == 0
    shutil.rmtree(world.output / "checkpoint-4")

    def goes_on(edit=lambda output: None):
        output = world.path / "copy"
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(world.output, output)
        edit(output)
        capsys.readouterr()
        assert world.run(**FLAGS, output_dir=output, resume_from_checkpoint="last") == 0
        return capsys.readouterr().out

    return goes_on


def as_by_earlier_versions(output):
    """Take out of a checkpoint what they did not note."""
    folder = output / "checkpoint-2"
    state = json.loads((folder / "trainer_state.json").read_text())
    kept = ("number of ranks", "version of torch", "version of kdfast")
    noted = state["identity"]["circumstances"]
    assert len(noted) > len(kept)
    state["identity"]["circumstances"] = {name: noted[name] for name in kept}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "SHA256SUMS").unlink()
    write_sums(folder, [path.name for path in folder.iterdir() if path.is_file()])


def test_what_the_last_bits_depend_on_is_compared(world, goes_on, monkeypatch):
    assert "Not as before" not in goes_on()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 7)
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
        said = re.search(r"Not as before: (.*); so not to the same bits", goes_on())[1]
        assert re.fullmatch(r"threads \(\d+ -> 7\), instruction set \(\w+ -> OTHER\)", said)
        assert "Not as before" not in goes_on(as_by_earlier_versions)

    (logits,) = (world.path / "cache" / "teacher").glob("*/logits.npy")
    rows = np.load(logits, mmap_mode="r+")
    rows[0] = np.nextafter(rows[0], np.float16(0))
    rows.flush()
    write_sums(logits.parent, ("header.json", "logits.npy"))
    assert "Not as before: bits of the teacher's logits; so not" in goes_on()


def test_lines_that_the_log_has_lost_are_counted(goes_on):
    def damage(output):
        log = output / "train_log.jsonl"
        lines = log.read_text().splitlines()
        assert len(lines) == 4
        log.write_text("\n".join([lines[0][:-5], *lines[1:]]))

    def cut(output):  # in a step that the run makes again
        log = output / "train_log.jsonl"
        log.write_text(log.read_text()[:-9])

    said = "train_log.jsonl has no line of 1 of the first 2 steps, the earliest being step 0"
    assert said in goes_on(damage)
    assert "has no line" not in goes_on(cut)
