import math

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast.models import dropout, load
from tests import published, readers
from tests.training.test_step import gradient

P = 0.3


def attend(query, key, value, mask, p):
    """The function through the door that transformers uses, (B, H, L, D) as it came."""
    return dropout.attention_forward(None, query, key, value, mask, p)[0].transpose(1, 2)


def plain_attention(query, key, value, mask, keep, scale):
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) * keep * scale) @ value


def draw_inputs(dtype=torch.float64, length=9):
    """query, key and value of (2, 3, length, 4), laid out as models give them, and a mask."""
    torch.manual_seed(0)
    inputs = [
        (3 * torch.randn(2, length, 3, 4, dtype=torch.float64)).to(dtype).transpose(1, 2)
        for _ in range(3)
    ]
    mask = torch.arange(length) < torch.tensor([length, length - 3])[:, None]
    return [each.requires_grad_() for each in inputs], mask[:, None, None, :]


def results(function, inputs):
    """The output, and the gradients of a random product of it."""
    output = function(*inputs)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    return output, *torch.autograd.grad((output * weights).sum(), inputs)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_plain_formula_with_its_mask(masked):
    inputs, mask = draw_inputs()
    mask = mask if masked else None
    torch.manual_seed(1)
    ours = results(lambda *each: attend(*each, mask, P), inputs)
    torch.manual_seed(1)
    keep, scale = dropout.keep_mask((2, 3, 9, 9), P)
    plain = results(lambda *each: plain_attention(*each, mask, keep, scale), inputs)
    assert 0 < keep.sum() < keep.numel()
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_hidden_dropout_is_the_plain_formula_with_its_mask():
    hidden = torch.randn(4, 5, 7, dtype=torch.float64).transpose(0, 1).requires_grad_()
    module = dropout.Dropout(P)
    torch.manual_seed(1)
    ours = results(module, [hidden])
    torch.manual_seed(1)
    keep, scale = dropout.keep_mask(hidden.shape, P)
    plain = results(lambda each: each * keep * scale, [hidden])
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    assert torch.equal(module.eval()(hidden), hidden)


def errors(function, inputs, exact):
    """The largest error of the output and of each gradient."""
    found = results(function, inputs)
    return [(a.double() - b).abs().max().item() for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_that_drops_nothing_errs_no_more_than_torch(dtype):
    inputs, mask = draw_inputs(dtype, length=60)
    wide = [each.detach().double().requires_grad_() for each in inputs]
    exact = results(lambda *each: plain_attention(*each, mask, 1, 1), wide)
    bias = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)

    def ours(query, key, value):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            return dropout.AttentionFunction.apply(query, key, value, bias, 0.5, 0.0)

    def theirs(query, key, value):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(query, key, value, mask)

    rows = zip(errors(ours, inputs, exact), errors(theirs, inputs, exact), exact, strict=True)
    for mine, torchs, value in rows:
        assert mine <= torchs + torch.finfo(dtype).eps * value.abs().max()


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_what_is_kept_is_as_likely_as_the_scale_says(p):
    torch.manual_seed(2)
    keep, scale = dropout.keep_mask((1000, 1001), p)
    assert abs(1 / scale - (1 - p)) <= 2**-17
    values = dropout.LANES / scale  # that are kept, of the 2**16
    assert values == pytest.approx(round(values), rel=1e-12)
    # Each of the four lanes of a random number by itself, and a lane given the one before.
    lanes = keep.view(-1)[: keep.numel() // 4 * 4].view(-1, 4).double()
    sigma = math.sqrt((1 - 1 / scale) / scale / len(lanes))
    assert (lanes.mean(0) - 1 / scale).abs().max() < 5 * sigma
    together = (lanes * lanes.roll(1, 1)).mean(0)
    assert (together - scale**-2).abs().max() < 5 * math.sqrt(
        scale**-2 * (1 - scale**-2) / len(lanes)
    )


@pytest.mark.parametrize("p", [0.0, 1e-9, 1.0])
def test_probabilities_at_the_ends(p):
    keep, scale = dropout.keep_mask((3, 5), p)
    assert math.isfinite(scale) and keep.float().mean() == (p < 1)


class Operations(TorchDispatchMode):
    """Names of the torch operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_that_torchs_dropout_is_seen():
    with Operations() as seen:
        torch.nn.functional.dropout(torch.ones(3))
    assert "bernoulli_" in seen.names


def answers(model, ids, mask):
    """Logits in eval() without a mask, with one, and with the one that transformers makes."""
    model.eval()
    bare = model.reader(ids, attention_mask=mask.long()).start_logits
    return [model(ids), model(ids, mask), bare]


@pytest.mark.parametrize("model_type", published.TYPES)
def test_every_type_trains_without_torchs_dropout(tmp_path, model_type, monkeypatch):
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    name = readers.save(tmp_path / "a", model_type, **rates)
    model = load.load_reader(name, "--student", embeds_dropout_prob=0.1).model
    ids = torch.arange(7, 47).view(2, 20)
    mask = torch.arange(20) < torch.tensor([20, 13])[:, None]
    before = answers(model, ids, mask)
    model.reader.save_pretrained(tmp_path / "loaded")
    model.train()
    dropout.speed_up_dropout(model)
    masks = []
    draw = dropout.keep_mask
    monkeypatch.setattr(dropout, "keep_mask", lambda *a: masks.append(draw(*a)) or masks[-1])
    runs = []
    for each in (None, mask, mask):
        masks.clear()
        torch.manual_seed(3)
        with Operations() as seen:
            logits = model(ids, each)
            logits.square().sum().backward()
        assert logits.isfinite().all() and "bernoulli_" not in seen.names
        runs.append((logits, [keep for keep, _ in masks]))
    assert torch.equal(runs[1][0], runs[2][0])
    # Of two layers' three masks each, and of embeddings and head, no two are the same.
    drawn = runs[2][1]
    assert sum(keep.numel() == 2 * 2 * 20 * 20 for keep in drawn) == 2
    assert len({keep.numpy().tobytes() for keep in drawn}) == len(drawn) >= 6

    assert all(map(torch.equal, before, answers(model, ids, mask)))
    model.reader.save_pretrained(tmp_path / "b")
    config = (tmp_path / "b/config.json").read_text()
    assert config == (tmp_path / "loaded/config.json").read_text()


def test_a_student_of_some_layers_has_it_too(tmp_path):
    name = readers.save(tmp_path, layers=4)
    loaded = load.load_reader(name, "--student")
    load.keep_layers(loaded, [0, 3], name)
    dropout.speed_up_dropout(loaded.model)
    with Operations() as seen:
        loaded.model.train()(torch.arange(7, 47).view(2, 20))
    assert "bernoulli_" not in seen.names


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_drops_the_same(setup, precision):
    distance = {}
    for p in (0.0, 0.1):
        grads = []
        for each in ("no", precision):
            run = setup(precision=each, dropout=p)
            grads.append(gradient(run, run.training.cuts.cut(np.arange(12)))[0])
        distance[p] = ((grads[1] - grads[0]).norm() / grads[0].norm()).item()
    print(distance)
    assert distance[0.1] < 2 * distance[0.0] < 0.2
