"""Several files' windows as those of one: the same batches, and nothing copied."""

import pickle

import numpy as np
import pytest
import torch

from kdfast.data.joined import Joined, joined, joined_arrays
from kdfast.data.prepare import prepare_windows
from kdfast.models.window_loader import HostLoader, ResidentLoader
from tests import corpora, small_tokenizers

PLACES = np.array([[4, 0], [8, 5], [4, 7]])


def test_joined_arrays_are_read_like_one():
    parts = [np.arange(5, dtype=np.uint16), np.arange(5, 9, dtype=np.int32)]
    both = Joined(parts)
    assert len(both) == 9 and both[6] == 6 and both[0] == 0
    assert both[PLACES].dtype == np.int32 and np.array_equal(both[PLACES], PLACES)
    assert np.array_equal(both[3:7], [3, 4, 5, 6]) and np.array_equal(np.array(both), np.arange(9))
    rows = Joined([np.ones((2, 2)), np.zeros((3, 2))])
    assert rows[np.array([1, 2])].tolist() == [[1, 1], [0, 0]]
    assert joined_arrays(parts[:1]) is parts[0]


@pytest.fixture
def parts(tmp_path):
    tokenizer = small_tokenizers.of_family("bert")
    return [
        prepare_windows(
            corpora.write(tmp_path / f"{count}.json", count), tokenizer, cache_dir=tmp_path
        )
        for count in (7, 3, 5)
    ]


@pytest.mark.parametrize("loader", [HostLoader, lambda *a: ResidentLoader(*a, torch.device("cpu"))])
def test_every_window_is_in_the_batch_as_in_its_own_file(parts, loader):
    draw = np.random.default_rng(1)
    logits = [draw.normal(size=(len(each.input_ids), 2)).astype(np.float16) for each in parts]
    together = loader(joined(parts), joined_arrays(logits))
    begin = 0
    for each, own in zip(parts, logits, strict=True):
        indices = draw.permutation(len(each))[:4]
        (alone,) = loader(each, own).micro_batches([indices])
        (found,) = together.micro_batches([begin + indices])
        assert torch.equal(found.teacher_logits, alone.teacher_logits)
        for name in ("input_ids", "token_type_ids"):
            assert torch.equal(found.inputs[name], alone.inputs[name])
        for name in ("start_positions", "end_positions"):
            assert torch.equal(getattr(found, name), getattr(alone, name))
        begin += len(each)
    mixed = [0, len(parts[0]), len(joined(parts)) - 1]
    (found,) = together.micro_batches([np.array(mixed)])
    assert found.mask is not None and len(found.start_positions) == 3


def test_questions_have_the_names_of_their_files(parts):
    whole, begin = joined(parts), 0
    assert np.array_equal(np.unique(whole.question), np.arange(2 * (7 + 3 + 5)))
    for each in parts:
        for window in range(len(each)):
            name = each.question_ids[int(each.question[window])]
            assert whole.question_ids[int(whole.question[begin + window])] == name
        begin += len(each)
    assert joined(parts[:1]) is parts[0]


def test_joined_windows_are_pickled_by_the_paths_of_their_files(tmp_path, parts):
    source = corpora.write(tmp_path / "many.json", 60)
    many = prepare_windows(source, small_tokenizers.of_family("bert"), cache_dir=tmp_path)
    whole = joined([many, *parts]).input_ids
    text = pickle.dumps(whole)
    assert len(text) < many.input_ids.nbytes / 3
    assert np.array_equal(np.array(pickle.loads(text)), np.array(whole))
