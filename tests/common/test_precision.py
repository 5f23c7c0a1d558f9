"""In which precision models compute: by type, by device, by flag."""

import pytest
import torch

from kdfast.common import precision
from kdfast.common.errors import UserError
from kdfast.common.precision import AUTOCAST, resolve, why_not
from kdfast.models.span_model import SpanModel
from tests import published, readers

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture
def card(monkeypatch):
    """card(bf16) makes every GPU one with, or without, bf16 of its own."""

    def make(bf16):
        monkeypatch.setattr(precision, "_has_bf16", lambda device: bf16 or device == CPU)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")

    return make


@pytest.mark.parametrize("kind", ["no", "fp16", "bf16"])
@pytest.mark.parametrize("model_type", published.TYPES)
def test_every_type_computes_in_every_precision(model_type, kind):
    """Also the first DeBERTa, which is refused until it was tried with trained weights."""
    reader, _ = readers.make(model_type)
    model = SpanModel(reader)
    ids, mask = readers.ids_of(reader)

    def logits():
        with torch.autocast("cpu", dtype=AUTOCAST[kind], enabled=kind != "no"):
            return model(ids, mask)

    found = logits()
    found.square().mean().backward()
    assert found.isfinite().all() and found.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(found[mask], model(ids, mask)[mask], rtol=0.2, atol=0.2)


@pytest.mark.parametrize(
    ("types", "bf16", "wanted"),
    [
        (["bert"], False, "fp16"),
        (["bert"], True, "fp16"),
        (["deberta-v2"], False, "fp16"),
        (["deberta"], False, "no"),
        (["deberta"], True, "no"),
        (["bert", "deberta"], True, "no"),
    ],
)
def test_the_default_is_the_best_that_models_and_card_can(card, types, bf16, wanted):
    card(bf16)
    said = []
    assert resolve(None, GPU, types, said.append) == wanted
    assert len(said) == (wanted != "fp16") and all("not fp16: deberta is not" in s for s in said)
    assert resolve(None, CPU, types, said.append) == "no" and len(said) == (wanted != "fp16")


@pytest.mark.parametrize(("bf16", "wanted"), [(True, "bf16"), (False, "no")])
def test_a_type_that_fp16_alone_is_too_small_for(card, monkeypatch, bf16, wanted):
    monkeypatch.setattr(precision, "CANNOT", {("bert", "fp16"): "reason"})
    card(bf16)
    said = []
    assert resolve(None, GPU, ["bert"], said.append) == wanted
    assert said == [
        f"--mixed_precision is {wanted}, not fp16: bert is not computed in it (reason)."
    ]


@pytest.mark.parametrize("device", [CPU, GPU])
def test_no_means_no_and_what_is_asked_for_is_given_or_refused(card, device):
    card(bf16=False)
    for each in published.TYPES:
        assert resolve("no", device, [each]) == "no"
    assert resolve("fp16", device, ["roberta"]) == "fp16"
    with pytest.raises(UserError, match=r"fp16: deberta is not .*: leave it out or use no\."):
        resolve("fp16", device, ["roberta", "deberta"])
    if device == CPU:
        assert resolve("bf16", device, ["roberta"]) == "bf16"
        return
    with pytest.raises(UserError, match=r"bf16: card 1 has no bf16 .*: leave it out or use fp16\."):
        resolve("bf16", device, ["roberta"])
    assert why_not("bf16", "roberta", device) == "card 1 has no bf16 of its own"
