import numpy as np
import pytest
import torch
from transformers import AutoConfig

from kdfast.common.errors import UserError
from kdfast.models.packing import PACKS, PackedWindows, wants_packing, why_not_packed
from kdfast.models.span_model import SpanModel
from tests import published, readers

LENGTHS = np.array([17, 40, 9, 33])
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def packed_windows(multiple=1):
    return PackedWindows.of(LENGTHS, torch.from_numpy(LENGTHS), 40, multiple)


@pytest.mark.parametrize("multiple", [1, 8])
def test_where_windows_lie(multiple):
    packed = packed_windows(multiple)
    total = 99 if multiple == 1 else 104
    bounds = [0, 17, 57, 66, 99, 104][: 5 if multiple == 1 else 6]
    assert packed.cu_seq_lens.tolist() == bounds and packed.cu_seq_lens.dtype == torch.int32
    assert packed.max_length == 40
    padded = torch.arange(1, 161).view(4, 40)
    ids = packed.pack(padded)
    assert ids.shape == (1, total) and not ids[0, 99:].any()
    rows = packed.unpack(ids, fill=-1)
    for row, length in enumerate(LENGTHS):
        assert torch.equal(rows[row, :length], padded[row, :length])
        assert (rows[row, length:] == -1).all()


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("model_type", sorted(PACKS))
def test_packed_windows_have_the_logits_of_padded_ones(model_type, multiple):
    reader, _ = readers.make(model_type)
    model = SpanModel(reader).double()
    ids, mask = readers.ids_of(reader, LENGTHS.tolist())
    ids[1, 5] = reader.config.pad_token_id  # a text may name it
    types = (torch.arange(40) > 4).expand(4, 40).long()
    wanted = model(ids, mask, types)
    model.enable_packing()
    assert torch.equal(model(ids, mask, types), wanted)  # what is padded goes the way it went
    packed = packed_windows(multiple)
    found = model(packed.pack(ids), None, packed.pack(types), packed)
    torch.testing.assert_close(found[mask], wanted[mask], rtol=0, atol=1e-12)
    assert not found[~mask].any()


def test_the_gradient_reaches_every_token_once():
    packed = packed_windows(8)
    logits = torch.zeros(1, 104, 2, requires_grad=True)
    weights = torch.arange(320.0).view(4, 40, 2)
    (packed.unpack(logits) * weights).sum().backward()
    real = torch.arange(40) < torch.from_numpy(LENGTHS)[:, None]
    assert torch.equal(logits.grad[0, :99], weights[real]) and not logits.grad[0, 99:].any()


@pytest.mark.parametrize("model_type", published.TYPES)
def test_what_packs(model_type):
    config = AutoConfig.for_model(model_type, attention_probs_dropout_prob=0.0)
    assert not wants_packing("auto", config, CPU)
    assert not wants_packing("off", config, CUDA)
    assert wants_packing("auto", config, CUDA) == (model_type in PACKS)
    if model_type in PACKS:
        assert wants_packing("on", config, CPU)
    else:
        with pytest.raises(UserError, match=f"type {model_type} cannot"):
            wants_packing("on", config, CUDA)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "attention_probs_dropout_prob 0.1"),
        ({"attention_probs_dropout_prob": 0.0, "hidden_size": 312}, "heads are 26 wide"),
    ],
)
def test_what_the_kernel_of_a_gpu_cannot_pack(changes, reason):
    config, said = AutoConfig.for_model("bert", **changes), []
    assert not wants_packing("auto", config, CUDA, said.append)
    assert len(said) == 1 and reason in said[0]
    with pytest.raises(UserError, match=reason):
        wants_packing("on", config, CUDA)
    assert wants_packing("on", config, CPU)
    teaches = why_not_packed(config, CUDA, trains=False)
    assert (teaches is None) == ("dropout" in reason)
