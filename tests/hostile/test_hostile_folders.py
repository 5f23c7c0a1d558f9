"""Checkpoints, caches and models that were damaged or made up.

Each is read as a run reads it and then used for one step: that works, or ends in one sentence.
Checksums are left out: who makes a folder up makes them too.
"""

import io
import json
import pickle
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdfast.common.errors import UserError
from kdfast.common.run import Run
from kdfast.data.cache import cache_folder
from kdfast.data.read import read_examples
from kdfast.data.windows import open_windows
from kdfast.evaluation import scoring
from kdfast.models import load as models
from kdfast.models import window_loader
from kdfast.models.checks import check_windows
from kdfast.reader import Reader
from kdfast.teachers import cache, teacher_pass
from kdfast.training import checkpoint
from kdfast.training.assemble import Progress
from kdfast.training.nonfinite import NonfiniteSteps
from tests import readers, steppers
from tests.hostile.mutations import (
    check_sentence,
    damaged_bytes,
    damaged_safetensors,
    examples,
    json_files,
)
from tests.programs import edit


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A run that stands after two steps, with a checkpoint and both caches."""
    home = tmp_path_factory.mktemp("ground")
    run = steppers.make(home, precision="fp16", max_tokens_per_micro_batch=400)
    for step in range(2):
        run.step(step, np.arange(8))
    run.training.run.output = home
    run.training.progress = Progress(steps=2, best_f1=10.0)
    identity = {"mixed_precision": "fp16", "seed": 42}
    saved = checkpoint.save_checkpoint(run.training, run.loaded.tokenizer, identity, 1)
    source = cache.Source("weights", "tokenizer", run.windows.key, "no")
    teacher = teacher_pass.TeacherPass(source, run.model, run.windows, torch.device("cpu"), 400)
    teacher_pass.fill_cache(home / "cache", teacher)
    return types.SimpleNamespace(
        home=home,
        run=run,
        nonfinite=NonfiniteSteps(run.training, run.windows),
        checkpoint=saved,
        source=source,
        student=home / "student",
        features=cache_folder(home / "cache", run.windows.key),
        teacher=home / "cache" / "teacher" / source.key,
        examples=read_examples(run.config.data.train_file[0]),
    )


class Damaged:
    """A folder one of whose files holds other bytes for a while."""

    def __init__(self, path: Path, content: bytes):
        self.path, self.content = path, content

    def __enter__(self):
        # Another file, as the good one may be mapped.
        self.kept = self.path.rename(self.path.with_name("kept-" + self.path.name))
        self.path.write_bytes(self.content)

    def __exit__(self, *error):
        self.kept.replace(self.path)


def spoiled(data, path: Path) -> Damaged:
    content = path.read_bytes()
    if path.suffix == ".json":
        return Damaged(path, data.draw(json_files(json.loads(content))))
    if path.suffix == ".safetensors":
        return Damaged(path, data.draw(damaged_safetensors(content)))
    return Damaged(path, data.draw(damaged_bytes(content)))


def used(ground, windows, logits, work):
    """`work`, and one step over the windows with the teacher's logits; whether all went well."""
    run, training = ground.run, ground.run.training
    kept = ground.run.model.state_dict()
    kept = {name: each.clone() for name, each in kept.items()}
    parts = training.loader, training.cuts.lengths
    try:
        work()
        training.loader = window_loader.HostLoader(windows, logits)
        training.cuts.lengths = windows.lengths
        report = run.step(3, np.arange(min(8, len(windows))))
        ground.nonfinite.check(report, run.step.micro_batches)
    except UserError as error:
        check_sentence(error)
        return False
    finally:
        training.loader, training.cuts.lengths = parts
        ground.run.model.load_state_dict(kept)
    return True


@examples(50)
@given(data=st.data())
def test_a_checkpoint(ground, data):
    names = ["trainer_state.json"] * 2 + ["optimizer.safetensors", "model.safetensors"]
    run = ground.run
    with spoiled(data, ground.checkpoint / data.draw(st.sampled_from(names))):

        def load():
            _, policy = checkpoint.load_checkpoint(ground.checkpoint, run.model, run.optimizer)
            run.training.cuts.policy = policy or run.training.cuts.policy

        before = run.training.cuts.policy
        used(ground, run.windows, run.training.loader.teacher_logits, load)
        run.training.cuts.policy = before
        run.optimizer.adamw.state.clear()


@examples(50)
@given(data=st.data())
def test_a_feature_cache(ground, data):
    run = ground.run
    names = st.sampled_from(["header.json"] * 6 + sorted(p.name for p in ground.features.glob("*")))
    with spoiled(data, ground.features / data.draw(names)):
        try:
            windows = open_windows(ground.features, run.windows.key)
            check_windows(run.model.reader, windows, 200, ground.home)
            validation = scoring.Validation(windows, ground.examples, 30, 20)
        except UserError as error:
            check_sentence(error)
            return
        windows.notes()
        logits = run.training.loader.teacher_logits

        def score():
            validation.score(run.model, Run())

        used(ground, windows, logits, score)


@examples(30)
@given(data=st.data())
def test_a_teacher_cache(ground, data):
    run = ground.run
    with spoiled(data, ground.teacher / data.draw(st.sampled_from(["header.json", "logits.npy"]))):
        try:
            tokens = len(run.windows.input_ids)
            logits = cache.open_cache(ground.home / "cache", ground.source, tokens, verify=False)
        except UserError as error:
            check_sentence(error)
            return
        used(ground, run.windows, logits, lambda: None)


@examples(30)
@given(data=st.data())
def test_a_model_folder(ground, data):
    names = ["config.json"] * 3 + ["tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    with spoiled(data, ground.student / data.draw(st.sampled_from(names))):
        try:
            loaded = models.load_reader(str(ground.student), "--student")
            models.check_fits(loaded, 100, "student")
            check_windows(loaded.model.reader, ground.run.windows, 200, ground.home)
            loaded.model(torch.from_numpy(ground.run.windows.padded([0])["input_ids"]))
            Reader(str(ground.student), device="cpu")("Who was it?", "It was Rollo of Normandy.")
        except UserError as error:
            check_sentence(error)


def grow(header, count):
    """The first tensor of a safetensors header claims `count` values."""
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"] = [count]
    header[name]["data_offsets"] = [0, 4 * count]
    return header


CLAIMS = {
    "hidden_size": 10**9,
    "vocab_size": 10**15,
    "num_hidden_layers": 10**9,
    "intermediate_size": 10**12,
    "max_position_embeddings": 10**15,
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_model_that_claims_more_than_it_holds(ground, name):
    config = json.loads((ground.student / "config.json").read_text())
    claim = json.dumps(config | {name: CLAIMS[name]}).encode()
    few = pytest.raises(UserError, match=r"lacks weights: .* that its config\.json describes")
    with Damaged(ground.student / "config.json", claim), few:
        models.load_reader(str(ground.student), "--student")


@pytest.mark.parametrize("name", ["num_labels", "num_hidden_groups", "inner_group_num"])
def test_an_albert_that_claims_what_would_fill_the_memory(tmp_path, name):
    folder = Path(readers.save(tmp_path / "albert", "albert"))
    edit(folder, "config.json", **{name: 10**9})
    with pytest.raises(UserError, match=r"has 1000000000 labels|lacks weights: "):
        models.load_reader(str(folder), "--student")


def test_layers_whose_kinds_would_fill_the_memory(tmp_path):
    """transformers makes a list of them, from the config.json alone."""
    folder = Path(readers.save(tmp_path / "reader", "modernbert"))
    config = json.loads((folder / "config.json").read_text())
    del config["layer_types"]
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**8}))
    with pytest.raises(UserError, match=r"lacks weights: no model holds the 100000000 layers"):
        models.load_reader(str(folder), "--student")


def test_a_model_that_loads_and_computes_nothing(ground):
    config = json.loads((ground.student / "config.json").read_text())
    claim = json.dumps(config | {"num_attention_heads": -1}).encode()
    no = pytest.raises(UserError, match=r"two windows .*invalid shape")
    with Damaged(ground.student / "config.json", claim), no:
        models.load_reader(str(ground.student), "--student")


def test_headers_that_claim_more_than_there_is(ground):
    path = ground.checkpoint / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text = json.dumps(grow(json.loads(data[8 : 8 + size]), 10**15)).encode()
    run, tokens = ground.run, len(ground.run.windows.input_ids)
    content = len(text).to_bytes(8, "little") + text + data[8 + size :]
    with Damaged(path, content), pytest.raises(UserError, match="cannot be read"):
        checkpoint.load_checkpoint(ground.checkpoint, run.model, run.optimizer)

    path = ground.teacher / "header.json"
    header = json.loads(path.read_text()) | {"tokens": 10**15}
    unlike = pytest.raises(UserError, match="does not match this run in tokens")
    with Damaged(path, json.dumps(header).encode()), unlike:
        cache.open_cache(ground.home / "cache", ground.source, tokens, verify=False)


def npy_of(header: str, data: bytes = bytes(4096)) -> bytes:
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def npy_header(descr="'<u2'", order="False", shape="(9,)") -> bytes:
    return npy_of(f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n")


def zipped() -> bytes:
    file = io.BytesIO()
    np.savez(file, np.zeros(9, np.uint16))
    return file.getvalue()


NPY = {
    "more than there is": npy_header(shape="(1000000000000000,)"),
    "less than nothing": npy_header(shape="(-9,)"),
    "too large a number": npy_header(shape=f"({'9' * 400},)"),
    "no number": npy_header(shape="('9',)"),
    "a table": npy_header(shape="(3, 3)"),
    "a single value": npy_header(shape="()"),
    "other bytes first": npy_header("'>u2'"),
    "fractions": npy_header("'<f4'"),
    "fields": npy_header("[('a', '<u2')]"),
    "objects": npy_header("'|O'"),
    "no type": npy_header("'what'"),
    "no header": npy_of(""),
    "an open bracket": npy_of("{'descr': ("),
    "an indent": npy_of("  1\n 2"),
    "deep": npy_of("(" * 9000 + ")" * 900),
    "many signs": npy_of("-" * 9000 + "1"),
    "nothing": b"",
    "another version": b"\x93NUMPY\x09\x00",
    "a zip archive": zipped(),
    "a broken zip archive": b"PK\x03\x04",
    "a pickle": pickle.dumps([1]),
}


@pytest.mark.parametrize("name", NPY)
def test_a_feature_file_that_is_no_such_array(ground, name):
    """One sentence that names the file, whatever numpy makes of it."""
    with (
        Damaged(ground.features / "input_ids.npy", NPY[name]),
        pytest.raises(UserError, match=r"a damaged cache \(input_ids\.npy .*delete this folder"),
    ):
        open_windows(ground.features, ground.run.windows.key)


def edited(ground, name, change):
    path = ground.features / f"{name}.npy"
    array = np.load(path)
    change(array)
    file = io.BytesIO()
    np.save(file, array)
    return Damaged(path, file.getvalue())


LABELS = {
    "label behind its window": ("end_positions", lambda a: a.__setitem__(3, 10**6)),
    "label behind by one": ("end_positions", "behind"),
    "label below": ("start_positions", lambda a: a.__setitem__(3, -7)),
    "half unlabelled": ("start_positions", lambda a: a.__setitem__(3, -100)),
    "window without a token": ("lengths", lambda a: a.__setitem__(3, 0)),
    "question": ("question", lambda a: a.__setitem__(3, 10**6)),
    "context": ("context", lambda a: a.__setitem__(3, -1)),
    "prefix": ("prefix", lambda a: a.__setitem__(3, 190)),
    "first token": ("first_token", lambda a: a.__setitem__(3, 1000)),
    "starts": ("window_start", lambda a: a.__setitem__(3, 10**15)),
}


@pytest.mark.parametrize("fault", LABELS)
def test_a_feature_file_whose_numbers_lead_astray(ground, fault):
    name, change = LABELS[fault]
    if change == "behind":
        lengths = ground.run.windows.lengths
        change = lambda a: a.__setitem__(3, lengths[3])  # noqa: E731
    with edited(ground, name, change), pytest.raises(UserError, match="a damaged cache"):
        open_windows(ground.features, ground.run.windows.key)


def test_a_token_that_the_model_does_not_know(ground):
    with edited(ground, "input_ids", lambda a: a.__setitem__(3, 60_000)):
        windows = open_windows(ground.features, ground.run.windows.key)
        with pytest.raises(UserError, match="holds token 60000, and the model knows"):
            check_windows(ground.run.model.reader, windows, 200, ground.home)


def test_nan_in_a_teacher_cache_is_caught_at_the_step(ground):
    run = ground.run
    start = run.windows.window_start
    logits = np.load(ground.teacher / "logits.npy")
    logits[start[5] + 2, 0] = np.nan
    content = io.BytesIO()
    np.save(content, logits)
    with Damaged(ground.teacher / "logits.npy", content.getvalue()):
        tokens = len(run.windows.input_ids)
        cached = cache.open_cache(ground.home / "cache", ground.source, tokens, verify=False)
        kept = run.training.loader
        run.training.loader = window_loader.HostLoader(run.windows, cached)
        with pytest.raises(UserError, match=r"the teacher's logits of question n2 \(window 5\)"):
            ground.nonfinite.check(run.step(4, np.arange(8)), run.step.micro_batches)
        run.training.loader = kept


def test_each_window_is_looked_at(ground):
    for name, entry in (("end_positions", 10**6), ("context", -1), ("question", 10**6)):
        for place in range(len(ground.run.windows)):
            change = partial(setitem, place=place, entry=entry)
            damaged = pytest.raises(UserError, match="a damaged cache")
            with edited(ground, name, change), damaged:
                open_windows(ground.features, ground.run.windows.key)


def setitem(array, place, entry):
    array[place] = entry
