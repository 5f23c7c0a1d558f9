"""Every supported type, with the config values of its published models, learns, teaches, answers.

Only widths, layers and vocabularies are shrunk; see tests/published.py. In half precision:
tests/test_models_table.py.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForQuestionAnswering

import kdfast
from kdfast import evaluate
from kdfast.models import load
from tests import published, readers
from tests.readers import ids_of


def test_every_supported_type_is_here():
    assert {each.model_type for each in published.MODELS.values()} == set(published.TYPES)
    for model_type, name in published.COMMON.items():
        assert published.MODELS[name].model_type == model_type


ALWAYS = ("answerdotai/ModernBERT-base", "distilbert-base-uncased", "microsoft/deberta-v3-base")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow)
        for name in published.MODELS
    ],
)
def test_from_fine_tuning_to_a_card(world, name):
    """A model without a head is fine-tuned by itself, then teaches, and the student has a card."""
    student = readers.save(world.path / "base", name, layers=2, head=False)
    alone = {"teacher": None, "distillation_loss_weight": 0}
    common = {"student": student, "max_steps": 2, "train_batch_size": 4}
    assert world.run(**common, **alone, output_dir=world.path / "alone") == 0
    taught = {"teacher": world.path / "alone", "save_steps": 2}
    assert world.run(**common, **taught) == 0
    record = json.loads((world.output / "run.json").read_text())
    assert record["steps"] == 2
    card = (world.output / "README.md").read_text()
    assert "pipeline_tag: question-answering" in card and "`distillation_loss_weight`" in card
    one, other = (
        load_file(folder / "model.safetensors") for folder in (world.path / "alone", world.output)
    )
    assert one.keys() == other.keys() and any(not torch.equal(one[k], other[k]) for k in one)

    saved, kept = (
        load.load_reader(str(folder), "--model").model.eval()
        for folder in (world.output, world.output / "checkpoint-2")
    )
    plain = AutoModelForQuestionAnswering.from_pretrained(world.output, dtype=torch.float32).eval()
    ids, mask = ids_of(plain)
    with torch.no_grad():
        ours, again, theirs = saved(ids, mask), kept(ids, mask), plain(ids, mask.long())
    assert torch.equal(ours, again)
    torch.testing.assert_close(ours[..., 0][mask], theirs.start_logits[mask])
    flags = ["--model", str(world.output), "--data", world.validation_file]
    flags += ["--cache_dir", str(world.path / "cache"), "--max_seq_length", "200"]
    assert evaluate.main(flags) == 0
    answer = kdfast.Reader(world.output)(question="Who is there?", context="Anna is there.")
    assert set(answer) == {"score", "start", "end", "answer"}


@pytest.mark.parametrize("name", published.MODELS)
def test_types_reach_only_a_model_that_has_embeddings_for_them(tmp_path, monkeypatch, name):
    model = load.load_reader(readers.save(tmp_path, name), "--model").model.eval()
    ids, mask = ids_of(model.reader)
    types = (torch.arange(ids.shape[1]) > 9).long().expand_as(ids)
    has_types = published.MODELS[name].config.get("type_vocab_size", 0) > 1
    assert model.takes_token_types == has_types
    given = []
    forward = model.reader.base_model.forward

    def recorded(*arguments, **named):
        given.append("token_type_ids" in named)
        return forward(*arguments, **named)

    monkeypatch.setattr(model.reader.base_model, "forward", recorded)
    with torch.no_grad():
        without, with_types = model(ids, mask), model(ids, mask, types)
    assert given == [False, has_types]
    assert torch.equal(without, with_types) != has_types


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", published.MODELS)
def test_another_tokenizer_both_ways(world, name):
    """Against RoBERTa, or where that is its own tokenizer, BERT."""
    own = readers.save(world.path / "own", name, seed=3)
    is_roberta = published.MODELS[name].tokenizer == "roberta"
    other = world.student if is_roberta else readers.save(world.path / "other", "roberta")
    flags = {"max_steps": 1, "train_batch_size": 4, "validation_file": None}
    assert world.run(student=own, teacher=other, **flags) == 0
    assert world.run(student=other, teacher=own, **flags, output_dir=world.path / "back") == 0


def test_a_bert_tokenizer_with_mpnet_has_types_that_it_never_gets(world):
    tokenizer = readers.make("bert")[1]
    name = readers.save(world.path / "mixed", "microsoft/mpnet-base", vocab_size=len(tokenizer))
    for path in (world.path / "mixed").glob("*token*"):
        path.unlink()
    tokenizer.save_pretrained(name)
    assert world.run(student=name, teacher=name, max_steps=1) == 0
