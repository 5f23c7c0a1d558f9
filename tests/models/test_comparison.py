"""What the check at loading accepts and refuses: of every kind of model that transformers has."""

import copy

import pytest
import torch
import transformers

from kdfast.common.errors import UserError
from kdfast.models import comparison, deberta, load, span_model
from kdfast.models.span_model import SpanModel
from tests import published, readers

SIZES = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "initializer_range": 0.3,
    "pad_token_id": 1,
}
# What else a type must be told so that it is small.
OWN = {
    "big_bird": {},
    "convbert": {"embedding_size": 16},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 8},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16},
    "qwen3": {"head_dim": 8},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
    "roformer": {"embedding_size": 16},
    "squeezebert": {"embedding_size": 16},
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "en_XX"},
}
# Types without a row in docs/models.md, which names them in a sentence.
ACCEPTED = (
    "data2vec-text",
    "ernie",
    "jina_embeddings_v3",
    "luke",
    "megatron-bert",
    "rembert",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "squeezebert",
    "xlm-roberta-xl",
    "xmod",
)


def small(model_type, **own):
    """A small model of any type, with transformers' default values for the rest."""
    config = transformers.AutoConfig.for_model(
        model_type, **{**SIZES, **OWN.get(model_type, {}), **own}
    )
    torch.manual_seed(0)
    return transformers.AutoModelForQuestionAnswering.from_config(config).eval()


def refusal(model):
    with pytest.raises(UserError) as error:
        load.span_model_of(model, "it", "--student")
    return str(error.value)


@pytest.mark.sample(4)
@pytest.mark.parametrize("model_type", ACCEPTED)
def test_a_type_that_is_read_alike_learns_and_comes_back_the_same(tmp_path, model_type):
    reader = small(model_type)
    before = {name: each.clone() for name, each in reader.named_parameters()}
    model = load.span_model_of(reader, "it", "--student")
    ids, mask = readers.ids_of(reader)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    model(ids, mask)[mask].square().mean().backward()
    optimizer.step()
    matrices = {name: each for name, each in before.items() if each.dim() > 1}
    moved = {name for name, each in matrices.items() if not each.equal(reader.get_parameter(name))}
    # Of XMOD another language's adapters, of LUKE the entities, of RoCBERT the other senses.
    still = {name for name in matrices.keys() - moved if ".layer" in name and "de_DE" not in name}
    assert not {name for name in still if model_type != "luke"} and moved
    model.eval().reader.save_pretrained(tmp_path)
    _, tokenizer = readers.make()
    again = load.load_reader(str(tmp_path), "--model", tokenizer=tokenizer).model
    with torch.no_grad():
        assert torch.equal(again(ids, mask), model(ids, mask))
        found = model(ids, mask)[1, :17], model(ids[1:, :17])[0]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "own", "words"),
    [
        ("fnet", {}, "whose logits change with padding"),
        ("convbert", {}, "whose logits change with padding"),
        ("qwen3", {}, "a token changes nothing before it"),
        ("gpt2", {}, "a token changes nothing before it"),
        ("big_bird", {}, "whose span head is not one linear layer"),
        ("splinter", {}, "whose span head is not one linear layer"),
        ("longformer", {"attention_window": 16}, "three separator tokens"),
        ("xmod", {"default_language": None}, "does not compute the logits of two windows"),
        ("ibert", {}, "does not compute the logits of two windows"),
    ],
)
def test_what_a_type_lacks_is_said(model_type, own, words):
    said = refusal(small(model_type, **own))
    assert said.startswith(f"--student it is of type {model_type}, ") and words in said
    assert "\n" not in said and ": name " in said


def test_the_padding_of_mobilebert_counts_where_its_weights_are_not_zero():
    """Its first layer reads neighbours: of a padding token whose embedding is not zero, too."""
    reader = small("mobilebert")
    load.span_model_of(reader, "it", "--student")
    with torch.no_grad():
        reader.get_input_embeddings().weight[1] += 1
    assert "whose logits change with padding (by " in refusal(reader)


def test_a_head_that_is_computed_otherwise_is_refused(monkeypatch):
    reader, _ = readers.make("modernbert")
    load.span_model_of(reader, "it", "--student")
    monkeypatch.setattr(span_model, "BEFORE_HEAD", {})
    assert "whose logits kdfast does not compute as transformers does (by " in refusal(reader)


@pytest.mark.parametrize("reach", [0, 1, 63, 65])
def test_layers_that_look_further_or_less_far_are_refused(monkeypatch, reach):
    """The windows of the check are longer than the 64 tokens that ModernBERT's layers reach."""
    reader, _ = readers.make("modernbert")
    assert SpanModel(reader).reach == 64
    monkeypatch.setattr(span_model, "reach_of", lambda reader: reach)
    with pytest.raises(UserError, match="does not compute as transformers does"):
        comparison.check_reads_alike(reader, "it", "--student")


@pytest.mark.parametrize("model_type", ["deberta", "deberta-v2"])
def test_an_attention_that_is_not_transformers_own_is_refused(monkeypatch, model_type):
    """DeBERTa's is replaced in place, so that transformers' own class must have computed before."""
    scores = deberta.position_scores
    monkeypatch.setattr(deberta, "position_scores", lambda *a: scores(*a).flip(-1))
    reader, _ = readers.make(model_type)
    assert "whose logits kdfast does not compute as transformers does (by " in refusal(reader)


def test_a_model_elsewhere_is_compared_by_a_copy():
    reader, _ = readers.make()
    model = load.span_model_of(copy.deepcopy(reader).bfloat16().train(), "it", "model")
    assert model.reader.dtype == torch.bfloat16 and model.reader.training
    assert "a token changes nothing" in refusal(small("qwen3").half())


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_weights_that_tell_nothing_are_refused_where_they_are_used(value):
    reader, _ = readers.make()
    torch.nn.init.constant_(reader.qa_outputs.weight, value)
    load.span_model_of(reader, "it", "--student")


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", published.MODELS)
def test_rounding_is_far_below_the_tolerance(name, monkeypatch):
    """The windows of published configurations differ by a hundredth of it, at most."""
    monkeypatch.setattr(comparison, "TOLERANCE", comparison.TOLERANCE / 100)
    load.span_model_of(readers.make(name, layers=12)[0], "it", "--student")
