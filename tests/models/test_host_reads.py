import copy
import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.deberta_v2 import modeling_deberta_v2

from kdfast.models.span_model import SpanModel
from tests import readers

LENGTHS = {"padded": (23, 17), "full": (23, 23), "short": (2, 1)}
NAMES = ("mpnet", "deberta", "deberta-v2", "microsoft/deberta-v2-xlarge")


class Reads(TorchDispatchMode):
    """Counts the reads of a tensor's value by the host."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def results(encode, model, mask):
    """The hidden states of real tokens, and the gradient of every weight that they depend on."""
    hidden = encode()[mask]
    hidden.square().sum().backward()
    return [hidden.detach(), *(each.grad for each in model.parameters() if each.grad is not None)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_as_the_model_of_transformers(name, lengths):
    untouched, _ = readers.make(name)
    model = SpanModel(copy.deepcopy(untouched))
    ids, mask = readers.ids_of(untouched, LENGTHS[lengths])
    given = None if mask.all() else mask
    ours = results(lambda: model.hidden_states(ids, given)[-1], model, mask)
    theirs = results(lambda: untouched.base_model(ids, mask.long())[0], untouched, mask)
    assert len(ours) > 20 and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("masked", [True, False])
# DeBERTa (v1) slices by numbers that are tensors of the host: those reads wait for no device.
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"deberta"}))
def test_no_pass_reads_the_device(name, masked, monkeypatch):
    reader, _ = readers.make(name)
    ids, mask = readers.ids_of(reader)
    with Reads() as reads:  # as the model is on its own
        reader.base_model(ids, attention_mask=mask.long() if name == "mpnet" else None)
    assert reads.count
    model = SpanModel(reader)

    def refused(*arguments):
        pytest.fail("a tensor of a Python number is copied to the device")

    monkeypatch.setattr(modeling_deberta_v2, "make_log_bucket_position", refused)
    with Reads() as reads:
        model(ids, mask if masked else None).sum().backward()
    assert not reads.count


def test_windows_beyond_the_kept_positions_are_read_too():
    untouched, _ = readers.make("deberta-v2", max_position_embeddings=16, max_relative_positions=16)
    model = SpanModel(copy.deepcopy(untouched))
    ids, mask = readers.ids_of(untouched)
    expected = untouched.base_model(ids, attention_mask=mask.long())[0]
    assert torch.equal(model.hidden_states(ids, mask)[-1], expected)


def test_a_copy_has_positions_of_its_own():
    reader, _ = readers.make("deberta-v2")
    before = set(reader.state_dict())
    copied = copy.deepcopy(SpanModel(reader).reader)
    assert copied.base_model.encoder.get_rel_pos.__self__ is copied.base_model.encoder
    assert set(copied.state_dict()) == before
    pickle.loads(pickle.dumps(copied))
