"""A teacher's pass over packed windows: its logits, and the way it was begun, which it keeps."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kdfast.config import WindowSettings
from kdfast.data.chunks import Shard
from kdfast.data.prepare import prepare_windows
from kdfast.models.span_model import SpanModel
from kdfast.teachers import cache, teacher_pass
from tests import corpora, readers
from tests.teachers.test_cache import Killed, killed_after

FP16 = {"rtol": 2**-10, "atol": 2**-12}


@pytest.fixture
def pass_(tmp_path, monkeypatch):
    """Fills caches, packed or not, and notes for each forward pass whether it was packed."""
    monkeypatch.setattr(teacher_pass, "SECONDS_BETWEEN_SAVES", 0.0)
    reader, tokenizer = readers.make("roberta")
    model, source = SpanModel(reader), corpora.write(tmp_path / "train.json")
    windows = prepare_windows(source, tokenizer, WindowSettings(200), cache_dir=tmp_path)
    key = cache.Source("weights", "tokenizer", windows.key, "no")
    ran = []
    model.register_forward_pre_hook(
        lambda _, args, inputs: ran.append(inputs.get("packed") is not None), with_kwargs=True
    )

    def made(packed, max_tokens=300):
        device = torch.device("cpu")
        return teacher_pass.TeacherPass(key, model, windows, device, max_tokens, packed)

    def fill(name, packed, progress=lambda windows: None, **more):
        return np.array(
            teacher_pass.fill_cache(tmp_path / name, made(packed, **more), progress=progress)
        )

    def share(name, packed, number, **more):
        teacher_pass.fill_shard(tmp_path / name, made(packed, **more), Shard(number, 2))

    def join(name):
        return teacher_pass.join_shards(tmp_path / name, key, windows)

    def header(name):
        return json.loads((tmp_path / name / "teacher" / key.key / "header.json").read_text())

    def partial(name):
        return tmp_path / name / "teacher" / f"{key.key}.partial"

    return SimpleNamespace(
        fill=fill, share=share, join=join, header=header, partial=partial, ran=ran
    )


def test_logits_are_those_of_padded_windows(pass_):
    padded = pass_.fill("padded", False)
    passes = len(pass_.ran)
    np.testing.assert_allclose(pass_.fill("packed", True), padded, **FP16)
    assert pass_.ran == [False] * passes + [True] * (len(pass_.ran) - passes)
    assert pass_.header("packed") == pass_.header("padded") | {"packed": True}
    assert "packed" not in pass_.header("padded")
    pass_.ran.clear()
    pass_.fill("one", True, max_tokens=len(padded))
    assert pass_.ran == [True]  # all at once, as no padding counts


@pytest.mark.parametrize("packed", [True, False])
def test_a_killed_pass_goes_on_as_it_began(pass_, packed):
    whole = pass_.fill("whole", packed)
    with pytest.raises(Killed):
        pass_.fill("killed", packed, killed_after(4))
    pass_.ran.clear()
    resumed = pass_.fill("killed", not packed, max_tokens=10_000)
    assert np.array_equal(resumed, whole) and pass_.header("killed") == pass_.header("whole")
    assert len(pass_.ran) > 1 and set(pass_.ran) == {packed}


@pytest.mark.parametrize("packed", [True, False])
def test_parts_go_on_as_the_first_began(pass_, packed):
    whole = pass_.fill("whole", packed)
    pass_.share("parts", packed, 0)
    # A whole pass that was begun the other way gives way to the parts.
    with pytest.raises(Killed):
        pass_.fill("other", not packed, killed_after(4))
    pass_.share("parts", not packed, 1, max_tokens=10_000)
    pass_.partial("other").rename(pass_.partial("parts"))
    pass_.ran.clear()
    assert np.array_equal(pass_.join("parts"), whole) and not pass_.ran
    assert pass_.header("parts") == pass_.header("whole")


def test_the_header_of_joined_parts_names_all_places(pass_, monkeypatch):
    for number in range(2):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: 7 + number)
        pass_.share("parts", False, number)
    pass_.join("parts")
    assert [each["threads"] for each in pass_.header("parts")["made_on"]] == ["7", "8"]
