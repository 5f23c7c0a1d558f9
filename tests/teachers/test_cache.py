import errno
import json
import os
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from kdfast.common.errors import UserError
from kdfast.common.files import write_sums
from kdfast.common.ranks import Ranks
from kdfast.config import WindowSettings
from kdfast.data.batches import cut_by_tokens
from kdfast.data.prepare import prepare_windows
from kdfast.models import load
from kdfast.models.inference import forward_windows
from kdfast.models.window_loader import HostLoader, flat_positions
from kdfast.teachers import cache as teacher
from kdfast.teachers import teacher_pass
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
                WindowSettings(200),
                cache_dir=self.cache,
            )
            self.tokens = len(self.windows.input_ids)
            self.source = teacher.Source(
                teacher.weights_key(self.folder), "tokenizer", self.windows.key, "no"
            )
            self.home = self.cache / "teacher" / self.source.key

        def fill(self, **arguments):
            return teacher_pass.fill_cache(self.cache, self.teacher(), **arguments)

        def teacher(self, max_tokens=300, precision="no"):
            source = replace(self.source, precision=precision)
            return teacher_pass.TeacherPass(source, self.model, self.windows, CPU, max_tokens)

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
    np.testing.assert_array_equal(np.load(pass_.home / "logits.npy"), filled)


def test_what_a_kill_after_the_pass_left_is_deleted(pass_):
    left = [pass_.home / "sums.bin", pass_.home.with_name(f"{pass_.source.key}.shards")]
    given = pass_.cache, pass_.source, pass_.tokens, Ranks()
    pass_.fill()
    for opens in (pass_.fill, partial(teacher.open_shared, *given)):
        left[0].write_bytes(b"1234")
        left[1].mkdir()
        (left[1] / "0").mkdir()
        assert opens() is not None
        assert not any(path.exists() for path in left)


class Killed(Exception):
    pass


def killed_after(count):
    """The progress of a pass that ends when it is called so many times."""
    calls = []

    def progress(windows):
        calls.append(windows)
        if len(calls) == count:
            raise Killed

    return progress


def test_a_killed_pass_goes_on_with_its_own_cuts(pass_, monkeypatch):
    whole = np.array(pass_.fill())
    shutil.rmtree(pass_.home)

    monkeypatch.setattr(teacher_pass, "SECONDS_BETWEEN_SAVES", 0.0)
    with pytest.raises(Killed):
        pass_.fill(progress=killed_after(4))
    assert teacher.open_cache(pass_.cache, pass_.source, pass_.tokens) is None

    ran = []
    run = teacher_pass.forward_windows
    monkeypatch.setattr(
        teacher_pass,
        "forward_windows",
        lambda model, windows, batches, *rest: run(
            model, windows, ran.extend(batches) or batches, *rest
        ),
    )
    # Another budget would cut otherwise: the header's one holds.
    resumed = teacher_pass.fill_cache(pass_.cache, pass_.teacher(max_tokens=10_000))
    assert np.array_equal(resumed, whole)
    assert 0 < sum(map(len, ran)) < len(pass_.windows)
    assert max(map(len, ran)) * 10 < 10_000
    assert not pass_.home.with_name(f"{pass_.source.key}.partial").exists()
    assert json.loads((pass_.home / "header.json").read_text())["max_tokens"] == 300


@pytest.mark.parametrize("name", ["header.json", "logits.npy", "sums.bin"])
def test_a_killed_pass_does_again_what_is_damaged(pass_, monkeypatch, name):
    whole = np.array(pass_.fill())
    shutil.rmtree(pass_.home)
    monkeypatch.setattr(teacher_pass, "SECONDS_BETWEEN_SAVES", 0.0)
    with pytest.raises(Killed):
        pass_.fill(progress=killed_after(4))
    partial = pass_.home.with_name(f"{pass_.source.key}.partial")
    kept = shutil.copytree(partial, pass_.cache / "kept")
    good = (partial / name).read_bytes()
    flipped = bytearray(good)
    places = [2]
    if name == "header.json":
        places = [good.find(b"300")]  # max_tokens
    elif name == "logits.npy":
        places = range(128, len(good), 4)
    for place in places:
        flipped[place] ^= 1
    for bad in (bytes(flipped), good[: len(good) // 2], b"", bytes(len(good))):
        shutil.rmtree(pass_.home, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(kept, partial)
        (partial / name).write_bytes(bad)
        np.testing.assert_array_equal(pass_.fill(), whole)


def test_a_pass_that_goes_on_elsewhere_says_so_and_names_both_places(pass_, monkeypatch, capsys):
    monkeypatch.setattr(teacher_pass, "SECONDS_BETWEEN_SAVES", 0.0)
    for threads, told in ((7, ""), (7, ""), (8, "threads (7 -> 8)"), (7, "")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with pytest.raises(Killed):
            pass_.fill(progress=killed_after(3))
        said = capsys.readouterr().out
        assert (told in said and "not to the bits" in said) if told else said == ""
    pass_.fill()
    header = json.loads((pass_.home / "header.json").read_text())
    assert [each["threads"] for each in header["made_on"]] == ["7", "8"]
    assert teacher.open_cache(pass_.cache, pass_.source, pass_.tokens) is not None


def test_a_partial_folder_of_something_else_is_not_taken_over(pass_):
    partial = pass_.home.with_name(f"{pass_.source.key}.partial")
    partial.mkdir(parents=True)
    (partial / "header.json").write_text(json.dumps({"format": 0}))
    (partial / teacher.PROGRESS_FILE).write_bytes(b"\1" * 99)
    np.save(partial / "logits.npy", np.zeros((pass_.tokens, 2), np.float16))
    np.testing.assert_allclose(pass_.fill(), direct(pass_), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
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


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b"\0" * 8),
        lambda path: path.write_bytes(path.read_bytes()[:-4]),
        lambda path: path.unlink(),
        lambda path: np.save(path, np.load(path).astype(np.float32)),
        lambda path: np.save(path, np.load(path)[:-1]),
    ],
)
def test_damaged_logits_are_refused(pass_, spoil, verify):
    pass_.fill()
    spoil(pass_.home / "logits.npy")
    with pytest.raises(UserError, match=r"is damaged \(.+\): delete that folder"):
        teacher.open_cache(pass_.cache, pass_.source, pass_.tokens, verify)


def as_before(folder):
    """Make a cache, or what a killed pass left, one of the earlier layout: logits.bin."""
    path = folder / "logits.npy"
    (folder / "logits.bin").write_bytes(np.load(path).tobytes())
    path.unlink()


def test_a_cache_of_the_earlier_layout_is_read(pass_):
    filled = np.array(pass_.fill())
    as_before(pass_.home)
    write_sums(pass_.home, ("header.json", "logits.bin"))
    found = teacher.open_cache(pass_.cache, pass_.source, pass_.tokens)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, filled)
    with (pass_.home / "logits.bin").open("r+b") as file:
        file.write(b"\1")
    with pytest.raises(UserError, match=r"damaged \(logits.bin is not what was written\)"):
        teacher.open_cache(pass_.cache, pass_.source, pass_.tokens)


def test_the_key_and_the_header_are_those_of_earlier_versions(pass_):
    source = teacher.Source("weights", "tokenizer", "windows", "bf16")
    assert source.key == "338c3ffde66a22bf86851062203fa645"
    pass_.fill()
    header = json.loads((pass_.home / "header.json").read_text())
    assert header["format"] == 3 and header["max_tokens"] == 300
    assert header["tokens"] == pass_.tokens and header["weights"] == pass_.source.weights


def test_a_pass_that_an_earlier_version_began_goes_on(pass_, monkeypatch):
    whole = np.array(pass_.fill())
    shutil.rmtree(pass_.home)
    monkeypatch.setattr(teacher_pass, "SECONDS_BETWEEN_SAVES", 0.0)
    with pytest.raises(Killed):
        pass_.fill(progress=killed_after(4))
    as_before(pass_.home.with_name(f"{pass_.source.key}.partial"))
    counted = []
    np.testing.assert_array_equal(pass_.fill(progress=counted.append), whole)
    assert counted[0] > 0 and (pass_.home / "logits.bin").is_file()
    found = teacher.open_cache(pass_.cache, pass_.source, pass_.tokens)
    np.testing.assert_array_equal(found, whole)


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

    monkeypatch.setattr(teacher_pass, "SECONDS_BETWEEN_SAVES", 0.0)
    save = teacher_pass.save_progress
    saved = []

    def third_fails(*arguments):
        if len(saved) == 3:
            full()
        saved.append(arguments)
        save(*arguments)

    monkeypatch.setattr(teacher_pass, "save_progress", third_fails)
    with pytest.raises(UserError, match=r"disk is full.*goes on from there"):
        pass_.fill()
    monkeypatch.undo()
    np.testing.assert_allclose(pass_.fill(), direct(pass_), rtol=2e-3, atol=2e-3)


def test_a_folder_that_cannot_be_written(pass_):
    (pass_.cache / "teacher").write_text("in the way")
    with pytest.raises(UserError, match="--cache_dir that is writable"):
        pass_.fill()


def test_a_teacher_in_half_precision_has_the_bits_of_autocast(pass_):
    batches = cut_by_tokens(np.arange(len(pass_.windows)), pass_.windows.lengths, 300)
    plain = np.zeros((pass_.tokens, 2), np.float16)
    for indices, rows in forward_windows(pass_.model, pass_.windows, batches, CPU, torch.bfloat16):
        plain[flat_positions(pass_.windows, indices)] = rows
    filled = teacher_pass.fill_cache(pass_.cache, pass_.teacher(precision="bf16"))
    assert torch.bfloat16 in {each.dtype for each in pass_.model.parameters()}
    np.testing.assert_array_equal(filled, plain)
