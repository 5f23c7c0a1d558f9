"""Forward passes without gradients: how many tokens, and what happens where memory runs out."""

import copy
import os
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdfast.common.errors import UserError
from kdfast.common.precision import AUTOCAST, works_in
from kdfast.config import WindowSettings
from kdfast.data.batches import cut_by_tokens
from kdfast.data.prepare import prepare_windows
from kdfast.models import inference
from kdfast.models.inference import Room, forward_windows
from kdfast.models.packing import PACKS
from kdfast.models.span_model import SpanModel
from tests import corpora, published, readers

CPU = torch.device("cpu")
REFUSED = torch.OutOfMemoryError("CUDA out of memory.")


def read(home, articles, model_type="bert", **sizes):
    """A model and windows for it, of some 10 to 60 tokens."""
    reader, tokenizer = readers.make(model_type, **sizes)
    source = corpora.write(home / "data.json", articles)
    settings = WindowSettings(60, 16, 24)
    windows = prepare_windows(source, tokenizer, settings, split="validation", cache_dir=home)
    assert len(windows) > 2 * articles and windows.lengths.min() < 40
    return SpanModel(reader), windows


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    return read(tmp_path_factory.mktemp("reading"), 12)


class Narrow:
    """A model that refuses memory for more than `tokens` padded tokens, and counts its passes."""

    def __init__(self, model, tokens, error=REFUSED):
        self.model, self.tokens, self.error = model, tokens, error
        self.seen = []

    def eval(self):
        self.model.eval()

    def width_multiple(self):
        return self.model.width_multiple()

    def __call__(self, input_ids, **inputs):
        self.seen.append(tuple(input_ids.shape))
        if input_ids.numel() > self.tokens:
            raise type(self.error)(*self.error.args)
        return self.model(input_ids, **inputs)


def logits_of(model, windows, batches, room=None):
    found = list(forward_windows(model, windows, batches, CPU, None, room))
    assert [each.tolist() for each, _ in found] == [each.tolist() for each in batches]
    return np.concatenate([rows for _, rows in found])


def test_what_does_not_fit_is_halved_and_stays_so(reading):
    model, windows = reading
    batches = cut_by_tokens(np.arange(len(windows)), windows.lengths, 900)
    narrow, room = Narrow(model, 300), Room()
    whole, found = logits_of(model, windows, batches), logits_of(narrow, windows, batches, room)
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5)
    refused = [n * width for n, width in narrow.seen if n * width > 300]
    assert len(refused) == 2 and 150 <= room.tokens <= 300  # 900, 450, 225
    again = Narrow(model, 300)
    assert np.array_equal(found, logits_of(again, windows, batches, room))
    assert all(n * width <= room.tokens for n, width in again.seen)


def test_a_batch_in_any_order_keeps_it(reading):
    model, windows = reading
    batches = [np.random.default_rng(0).permutation(len(windows))]
    found = logits_of(Narrow(model, 200), windows, batches)
    np.testing.assert_allclose(found, logits_of(model, windows, batches), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", sorted(PACKS))
def test_packed_windows_have_the_logits_of_padded_ones(tmp_path, model_type):
    """In fp64, rounded to fp32 at the end."""
    model, windows = read(tmp_path, 12, model_type)
    model, batches = model.double(), np.array_split(np.arange(len(windows)), 3)
    padded = logits_of(model, windows, batches)
    model.enable_packing()
    narrow = Narrow(model, 10**6)
    packed = logits_of(narrow, windows, batches, Room(packs=True))
    assert narrow.seen == [(1, windows.lengths[batch].sum()) for batch in batches]
    np.testing.assert_allclose(packed, padded, rtol=1e-6, atol=1e-9)


def test_packed_windows_that_do_not_fit_are_halved(reading):
    model, windows = reading
    model = copy.deepcopy(model)
    batches = [np.random.default_rng(0).permutation(len(windows))]
    whole = logits_of(model, windows, batches)
    model.enable_packing()
    narrow, room = Narrow(model, 300), Room(packs=True)
    found = logits_of(narrow, windows, batches, room)
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5)
    assert room.tokens == [width for _, width in narrow.seen if width > 300][-1] // 2
    again = Narrow(model, 300)
    logits_of(again, windows, batches, room)
    tokens = [width for _, width in again.seen]
    assert max(tokens) <= room.tokens and sum(tokens) == windows.lengths.sum()
    assert min(tokens[:-1]) + windows.lengths.max() > room.tokens  # no padding counts
    with pytest.raises(UserError, match="for a single window"):
        logits_of(Narrow(model, int(windows.lengths.max()) - 1), windows, batches, room)


def test_one_window_that_does_not_fit_is_a_users_sentence(reading):
    model, windows = reading
    batches = [np.arange(5)]
    room = int(windows.lengths[:5].max()) - 1
    with pytest.raises(UserError, match=r"not enough memory on cpu for a single window of \d+ tok"):
        logits_of(Narrow(model, room), windows, batches)


def test_no_other_error_is_taken_for_it(reading):
    model, windows = reading
    error = RuntimeError("could not create a primitive descriptor for the matmul primitive")
    with pytest.raises(RuntimeError, match="primitive descriptor"):
        logits_of(Narrow(model, 10, error), windows, [np.arange(9)])


def test_a_pass_that_failed_holds_no_tensor(reading):
    model, windows = reading
    held = []

    class Greedy(Narrow):
        def __call__(self, input_ids, **inputs):
            assert not any(each() is not None for each in held)
            activation = torch.zeros(input_ids.shape)
            held.append(weakref.ref(activation))
            return super().__call__(input_ids, **inputs)

    logits_of(Greedy(model, 200), windows, [np.arange(30)])
    assert len(held) > 3


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside held at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if not isinstance(each, torch.Tensor):
                continue
            storage = each.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known:
                self.known.add(key)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, key, size)
        return made

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("kind", ["no", "fp16"])
@pytest.mark.parametrize("model_type", published.TYPES)
def test_the_bytes_of_a_token_bound_what_a_pass_holds(model_type, kind):
    if not works_in(model_type, kind):
        pytest.skip(f"{model_type} does not compute in {kind}")
    sizes = {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 384}
    reader, _ = readers.make(model_type, layers=3, **sizes)
    model, dtype = SpanModel(reader), AUTOCAST[kind]
    if dtype is not None:
        model.cast_linear_layers(dtype)
    for lengths in ([256] * 2 + [250], [64] * 6):
        ids, mask = readers.ids_of(reader, lengths)
        with (
            torch.inference_mode(),
            torch.autocast("cpu", dtype=dtype, enabled=dtype is not None),
            Peak() as peak,
        ):
            model(ids, mask)
        share = peak.most / (ids.numel() * inference.bytes_per_token(model, ids.shape[1], dtype))
        assert 0.2 < share <= 1


def test_the_start_is_made_of_model_and_free_memory(monkeypatch, reading):
    model, windows = reading
    assert inference.forward_tokens(model, windows, CPU, None) == 1536
    gpu, free = torch.device("cuda", 1), {torch.device("cuda", 1): 10**7}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
    each = inference.bytes_per_token(model, 60, None)
    assert inference.forward_tokens(model, windows, gpu, None) == 8 * 10**6 // each
    packs = copy.deepcopy(model)
    packs.enable_packing()
    assert inference.bytes_per_token(packs, 60, None) == each
    free[gpu] = 1
    assert inference.forward_tokens(model, windows, gpu, None) == windows.lengths.max()
    free[gpu] = 10**15
    assert inference.forward_tokens(model, windows, gpu, None) == inference.GPU_TOKENS_AT_MOST


LIMITED = """
import resource, sys
from pathlib import Path

import numpy as np
import torch

from kdfast.models.inference import Room
from tests.models.test_inference import logits_of, read

torch.set_num_threads(1)
model, windows = read(Path(sys.argv[1]), 120, hidden_size=64, intermediate_size=2048)
everything = np.arange(len(windows))
whole = logits_of(model, windows, np.array_split(everything, 50))
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 40 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
room = Room()
found = logits_of(model, windows, [everything], room)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
np.testing.assert_allclose(found, whole, rtol=1e-3, atol=1e-4)
print(room.tokens < len(windows) * 20)
"""


def test_a_real_limit_of_memory(tmp_path):
    """All windows at once take some 300 MB, and 40 are left."""
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        # Fixed, so that glibc gives back the address space of what is freed; the limit counts it.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)},
    )
    assert ended.stdout.split() == ["True"], ended.stderr[-2000:]
