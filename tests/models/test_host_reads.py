import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdfast.models.span_model import SpanModel
from tests import readers

LENGTHS = {"padded": (23, 17), "full": (23, 23), "short": (2, 1)}


class Reads(TorchDispatchMode):
    """Counts the reads of a tensor's value by the host."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def results(encode, model, mask):
    """The hidden states of real tokens, and the gradient of every weight that they depend on."""
    hidden = encode()[mask]
    hidden.sin().sum().backward()  # squares of what a norm gives have hardly a gradient
    return [hidden.detach(), *(each.grad for each in model.parameters() if each.grad is not None)]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_same_bits_as_the_model_of_transformers(lengths):
    untouched, _ = readers.make("mpnet")
    model = SpanModel(copy.deepcopy(untouched))
    ids, mask = readers.ids_of(untouched, LENGTHS[lengths])
    given = None if mask.all() else mask
    ours = results(lambda: model.hidden_states(ids, given)[-1], model, mask)
    theirs = results(lambda: untouched.base_model(ids, mask.long())[0], untouched, mask)
    assert len(ours) > 20 and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("masked", [True, False])
def test_no_pass_reads_the_device(masked):
    reader, _ = readers.make("mpnet")
    ids, mask = readers.ids_of(reader)
    with Reads() as reads:  # as the model is on its own
        reader.base_model(ids, attention_mask=mask.long())
    assert reads.count
    model = SpanModel(reader)
    with Reads() as reads:
        model(ids, mask if masked else None).sum().backward()
    assert not reads.count
