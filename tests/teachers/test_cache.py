import errno
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from kdfast.common.errors import UserError
from kdfast.data.batches import cut_by_tokens
from kdfast.data.prepare import prepare_windows
from kdfast.models import load
from kdfast.models.inference import forward_windows
from kdfast.models.loader import HostLoader, flat_positions
from kdfast.teachers import cache as teacher
from kdfast.tokenizers.load import load_tokenizer
from tests import corpora, readers

CPU = torch.device("cpu")


@pytest.fixture
def pass_(tmp_path):
    """A teacher, windows, the source that names them, and a function that fills the cache."""

    class Pass:
        folder = tmp_path / "teacher"
        cache = tmp_path / "cache"

        def __init__(self):
            readers.save(self.folder)
            self.model = load.load_reader(str(self.folder), "--teacher").model
            tokenizer = load_tokenizer(self.folder, "--teacher")
            self.windows = prepare_windows(
                corpora.write(tmp_path / "train.json"),
                tokenizer,
                max_seq_length=200,
                cache_dir=self.cache,
            )
            self.tokens = len(self.windows.input_ids)
            self.source = teacher.Source(
                teacher.weights_key(self.folder), "tokenizer", self.windows.key, "no"
            )
            self.home = self.cache / "teacher" / self.source.key

        def fill(self, **arguments):
            return teacher.fill_cache(
                self.cache,
                self.source,
                self.model,
                self.windows,
                CPU,
                **{"max_tokens": 300, **arguments},
            )

    return Pass()


def direct(pass_):
    """Every window alone through the model."""
    pass_.model.eval()
    rows = np.zeros((pass_.tokens, 2), np.float16)
    for index in range(len(pass_.windows)):
        one = np.array([index])
        batch = HostLoader(pass_.windows, None).micro_batch(one)
        with torch.no_grad():
            logits = pass_.model(**batch.inputs)[0]
        rows[flat_positions(pass_.windows, one)] = logits.numpy().astype(np.float16)
    return rows


def test_cache_holds_the_raw_logits_of_every_real_token(pass_):
    assert teacher.open_cache(pass_.cache, pass_.source, pass_.tokens) is None
    counted = []
    filled = pass_.fill(progress=counted.append)
    assert sum(counted) == len(pass_.windows)
    assert filled.dtype == np.float16 and filled.shape == (pass_.tokens, 2)
    np.testing.assert_allclose(filled, direct(pass_), rtol=2e-3, atol=2e-3)
    assert np.std(filled.astype(float)) > 0.1
    again = teacher.open_cache(pass_.cache, pass_.source, pass_.tokens)
    assert isinstance(again, np.memmap) and np.array_equal(again, filled)
    assert (pass_.home / "logits.bin").stat().st_size == 4 * pass_.tokens


class Killed(Exception):
    pass


def test_a_killed_pass_goes_on_with_its_own_cuts(pass_, monkeypatch):
    whole = np.array(pass_.fill())
    shutil.rmtree(pass_.home)

    monkeypatch.setattr(teacher, "SECONDS_BETWEEN_SAVES", 0.0)
    calls = []

    def progress(windows):
        calls.append(windows)
        if len(calls) == 4:
            raise Killed

    with pytest.raises(Killed):
        pass_.fill(progress=progress)
    assert teacher.open_cache(pass_.cache, pass_.source, pass_.tokens) is None

    ran = []
    run = teacher.forward_windows
    monkeypatch.setattr(
        teacher,
        "forward_windows",
        lambda model, windows, batches, *rest: run(
            model, windows, ran.extend(batches) or batches, *rest
        ),
    )
    # Another budget would cut otherwise: the header's one holds.
    resumed = pass_.fill(max_tokens=10_000)
    assert np.array_equal(resumed, whole)
    assert 0 < sum(map(len, ran)) < len(pass_.windows)
    assert max(map(len, ran)) * 10 < 10_000
    assert not pass_.home.with_name(f"{pass_.source.key}.partial").exists()
    assert json.loads((pass_.home / "header.json").read_text())["max_tokens"] == 300


def test_a_partial_folder_of_something_else_is_not_taken_over(pass_):
    partial = pass_.home.with_name(f"{pass_.source.key}.partial")
    partial.mkdir(parents=True)
    (partial / "header.json").write_text(json.dumps({"format": 0}))
    (partial / teacher.PROGRESS_FILE).write_bytes(b"\1" * 99)
    (partial / "logits.bin").write_bytes(b"\0" * 4 * pass_.tokens)
    np.testing.assert_allclose(pass_.fill(), direct(pass_), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda home: (home / "logits.bin").write_bytes(b"\0" * 8), "size of logits.bin"),
        (lambda home: (home / "logits.bin").unlink(), "size of logits.bin"),
        (lambda home: (home / "header.json").write_text("{}"), "format"),
        (lambda home: (home / "header.json").write_text("nothing"), "format"),
        (lambda home: _change(home, "windows", "others"), "windows"),
        (lambda home: _change(home, "precision", "fp16"), "precision"),
    ],
)
def test_a_cache_that_does_not_match_is_refused_with_the_reason(pass_, spoil, word):
    pass_.fill()
    spoil(pass_.home)
    with pytest.raises(UserError, match=f"does not match this run in .*{word}"):
        teacher.open_cache(pass_.cache, pass_.source, pass_.tokens)


def _change(home, name, value):
    header = json.loads((home / "header.json").read_text())
    (home / "header.json").write_text(json.dumps({**header, name: value}))


def test_the_key_covers_weights_windows_tokenizer_and_precision(pass_, tmp_path):
    key = pass_.source.key
    for name in ("weights", "tokenizer", "windows", "precision"):
        assert teacher.Source(**{**pass_.source.__dict__, name: "other"}).key != key
    same = teacher.weights_key(pass_.folder)
    with torch.no_grad():
        pass_.model.reader.qa_outputs.bias += 1e-6
    pass_.model.reader.save_pretrained(tmp_path / "other")
    assert teacher.weights_key(tmp_path / "other") != same
    readers.save(tmp_path / "copy")
    assert teacher.weights_key(tmp_path / "copy") == same


@pytest.mark.parametrize("value", [float("nan"), 1e6, -1e6])
def test_a_teacher_that_is_not_finite_names_the_question(pass_, value):
    with torch.no_grad():
        pass_.model.reader.qa_outputs.bias[1] = value
    with pytest.raises(UserError, match=r"not finite in fp16 for question [nq]\d+"):
        pass_.fill()
    assert not pass_.home.exists()


def test_a_full_disk_is_one_sentence_and_loses_nothing(pass_, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="disk is full"):
        pass_.fill()
    assert teacher.open_cache(pass_.cache, pass_.source, pass_.tokens) is None
    monkeypatch.undo()

    monkeypatch.setattr(teacher, "SECONDS_BETWEEN_SAVES", 0.0)
    save = teacher._save_progress
    saved = []

    def third_fails(*arguments):
        if len(saved) == 3:
            full()
        saved.append(arguments)
        save(*arguments)

    monkeypatch.setattr(teacher, "_save_progress", third_fails)
    with pytest.raises(UserError, match=r"disk is full.*goes on from there"):
        pass_.fill()
    monkeypatch.undo()
    np.testing.assert_allclose(pass_.fill(), direct(pass_), rtol=2e-3, atol=2e-3)


def test_a_folder_that_cannot_be_written(pass_):
    (pass_.cache / "teacher").write_text("in the way")
    with pytest.raises(UserError, match="--cache_dir that is writable"):
        pass_.fill()


def test_a_teacher_in_half_precision_has_the_bits_of_autocast(pass_):
    source = replace(pass_.source, precision="bf16")
    batches = cut_by_tokens(np.arange(len(pass_.windows)), pass_.windows.lengths, 300)
    plain = np.zeros((pass_.tokens, 2), np.float16)
    for indices, rows in forward_windows(pass_.model, pass_.windows, batches, CPU, torch.bfloat16):
        plain[flat_positions(pass_.windows, indices)] = rows
    filled = teacher.fill_cache(
        pass_.cache, source, pass_.model, pass_.windows, CPU, max_tokens=300
    )
    assert torch.bfloat16 in {each.dtype for each in pass_.model.parameters()}
    np.testing.assert_array_equal(filled, plain)
