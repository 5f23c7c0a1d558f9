"""DeBERTa's attention: kdfast.models.deberta against transformers' own, in two layers of a reader.

Before any clock, gradients agree. CPU time of one thread, widths and heads of published models;
both candidates have kdfast's cheap dropout. `saved` is what autograd keeps for the backward pass.
"""

import copy
import statistics
from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForQuestionAnswering, PreTrainedModel

from kdfast.models import dropout
from kdfast.models.span_model import SpanModel
from tests.published import MODELS

from . import records
from .measure import clock, time_interleaved

NAMES = {"v3": "microsoft/deberta-v3-base", "v1": "microsoft/deberta-base"}
# Version, width, heads (64 wide), windows, their length.
SHAPES = [
    ("v3", 384, 6, 2, 384),
    ("v3", 384, 6, 8, 128),
    ("v3", 768, 12, 1, 384),
    ("v1", 384, 6, 2, 384),
]
LAYERS, GATE = 2, 1e-10


def reader(version: str, width: int, heads: int) -> PreTrainedModel:
    """A reader of LAYERS layers with random weights."""
    model = MODELS[NAMES[version]]
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
    own = {**model.config, **sizes, "vocab_size": 1000, "num_hidden_layers": LAYERS}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model.model_type, **own)
    return AutoModelForQuestionAnswering.from_config(config)


def batch(windows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and the mask of a batch whose last window is half as long."""
    ids = torch.randint(5, 999, (windows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[-1, length // 2 :] = False
    return ids, mask


def cheap_dropout(model: nn.Module) -> None:
    """kdfast's dropout modules in transformers' model: that is not what is compared."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout:
                setattr(module, name, dropout.Dropout(child.p))


def pair(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Copies of a model: with transformers' attention, and with kdfast's."""
    found = {"transformers": copy.deepcopy(model), "kdfast": SpanModel(copy.deepcopy(model))}
    cheap_dropout(found["transformers"])
    dropout.speed_up_dropout(found["kdfast"])
    return found


def encode(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The last hidden states of real tokens."""
    if isinstance(model, SpanModel):
        return model.hidden_states(ids, mask)[-1][mask]
    return model.base_model(ids, attention_mask=mask.long())[0][mask]


def gate(models: dict[str, nn.Module], ids: torch.Tensor, mask: torch.Tensor) -> None:
    """In fp64 and without dropout, hidden states and all gradients agree."""
    found = []
    for model in models.values():
        wide = copy.deepcopy(model).double().eval()
        hidden = encode(wide, ids, mask)
        hidden.sin().sum().backward()
        grads = [each.grad for each in wide.parameters() if each.grad is not None]
        found.append([hidden.detach(), *grads])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=GATE, atol=GATE)


@pytest.mark.parametrize("version", NAMES)
def test_gate(version):
    gate(pair(reader(version, 64, 2)), *batch(3, 20))


def test_the_gate_can_fail():
    models = pair(reader("v3", 64, 2))
    attention = models["kdfast"].reader.base_model.encoder.layer[1].attention.self
    attention.scaling *= 1 + 1e-6
    with pytest.raises(AssertionError):
        gate(models, *batch(3, 20))


def saved(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, weights included."""
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = encode(model, ids, mask)
    del held
    return sum(kept.values())


def trained(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> tuple[float]:
    """Seconds of a forward and backward pass."""
    started = clock("cpu")
    encode(model, ids, mask).square().mean().backward()
    return (clock("cpu") - started,)


@torch.inference_mode()
def read(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> tuple[float]:
    """Seconds of a forward pass without gradients."""
    started = clock("cpu")
    encode(model, ids, mask)
    return (clock("cpu") - started,)


def row(shape: tuple[str, int, int, int, int]) -> dict[str, float | int | str]:
    """One line of the record: how many times as fast kdfast is, and what is kept."""
    version, width, heads, windows, length = shape
    models, (ids, mask) = pair(reader(version, width, heads)), batch(windows, length)
    gate(models, ids[:, ::8], mask[:, ::8])
    found: dict[str, float | int | str] = dict(
        zip(("version", "width", "heads", "windows", "length"), shape, strict=True)
    )
    for name, run in {"training": trained, "reading": read}.items():
        for model in models.values():
            model.train(run is trained)
        runs = {key: partial(run, model, ids, mask) for key, model in models.items()}
        taken = time_interleaved(runs)
        pairs = zip(taken["transformers"], taken["kdfast"], strict=True)
        found[name] = round(statistics.median(sum(one) / sum(other) for one, other in pairs), 2)
    for key, model in models.items():
        found[f"saved, {key}"] = saved(model.train(), ids, mask)
    return found


@pytest.mark.timed
def test_attention(capsys):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    machine = records.machine("cpu") | {"threads": 1, "layers": LAYERS}
    rows = [row(shape) for shape in SHAPES]
    torch.set_num_threads(before)
    report = {"machine": machine, "attention": rows}
    with capsys.disabled():
        print("", *rows, records.write(records.HERE / "deberta_cpu.json", report), sep="\n")
