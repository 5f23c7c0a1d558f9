import json

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForQuestionAnswering

from kdfast.common.errors import UserError
from kdfast.models import load
from tests import published, readers
from tests.readers import ids_of


@pytest.mark.parametrize("model_type", published.TYPES)
def test_logits_are_those_of_the_hugging_face_class(tmp_path, model_type):
    name = readers.save(tmp_path, model_type)
    loaded = load.load_reader(name, "--model")
    loaded.model.eval()
    plain = AutoModelForQuestionAnswering.from_pretrained(name, dtype=torch.float32).eval()
    ids, mask = ids_of(plain)
    with torch.no_grad():
        ours = loaded.model(ids, mask)
        theirs = plain(ids, attention_mask=mask.long())
        bare = loaded.model(ids[:1])
        bare_theirs = plain(ids[:1], attention_mask=mask[:1].long())
    theirs = torch.stack([theirs.start_logits, theirs.end_logits], -1)
    bare_theirs = torch.stack([bare_theirs.start_logits, bare_theirs.end_logits], -1)
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours[mask], theirs[mask])
    torch.testing.assert_close(bare, bare_theirs)


@pytest.mark.parametrize("model_type", published.TYPES)
def test_padding_does_not_change_the_real_tokens(tmp_path, model_type):
    loaded = load.load_reader(readers.save(tmp_path, model_type), "--model")
    loaded.model.double().eval()
    ids, mask = ids_of(loaded.model.reader)
    with torch.no_grad():
        padded = loaded.model(ids, mask)[1, :17]
        alone = loaded.model(ids[1:, :17])[0]
    torch.testing.assert_close(padded, alone, rtol=1e-9, atol=1e-9)


def test_eager_attention_is_said(tmp_path):
    notes = load.load_reader(readers.save(tmp_path, "mpnet"), "--model").notes
    assert any("eager attention" in note for note in notes)
    for name in ("bert", "deberta"):
        assert load.load_reader(readers.save(tmp_path / name, name), "--model").notes == []


def test_a_half_precision_checkpoint_loads_in_fp32(tmp_path):
    model, tokenizer = readers.make()
    model.half().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load.load_reader(str(tmp_path), "--student")
    assert {each.dtype for each in loaded.model.parameters()} == {torch.float32}


def test_head_is_not_rounded_by_autocast(tmp_path):
    loaded = load.load_reader(readers.save(tmp_path), "--model")
    ids, _ = ids_of(loaded.model.reader)
    with torch.autocast("cpu", torch.bfloat16):
        logits = loaded.model(ids)
    assert logits.dtype == torch.float32
    assert (logits != logits.bfloat16().float()).any()


def test_dropout_stands_before_the_head_in_training_only(tmp_path):
    name = readers.save(tmp_path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = load.load_reader(name, "--student", embeds_dropout_prob=0.5).model
    ids, _ = ids_of(model.reader)
    assert not torch.equal(model.train()(ids), model.train()(ids))
    assert torch.equal(model.eval()(ids), model.eval()(ids))


def test_a_new_head_depends_on_the_seed_alone(tmp_path):
    name = readers.save(tmp_path, head=False)
    heads = []
    for seed, noise in ((1, 0), (1, 99), (2, 0)):
        torch.manual_seed(noise)
        loaded = load.load_reader(name, "--student", new_head_seed=seed)
        assert any("new one" in note for note in loaded.notes)
        heads.append(loaded.model.reader.qa_outputs.weight.detach())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_kept_layers_are_the_teachers(tmp_path):
    name = readers.save(tmp_path, layers=4)
    whole = load.load_reader(name, "--teacher")
    part = load.load_reader(name, "--teacher")
    load.keep_layers(part, [0, 3], name)
    layers = part.model.reader.base_model.encoder.layer
    original = whole.model.reader.base_model.encoder.layer
    assert len(layers) == 2
    for ours, theirs in zip(layers, (original[0], original[3]), strict=True):
        for mine, his in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, his)
    part.model.reader.save_pretrained(tmp_path / "part")
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "part").eval()
    ids, _ = ids_of(again)
    with torch.no_grad():
        assert torch.equal(again(ids).start_logits, part.model.eval()(ids)[..., 0])


def test_what_a_new_head_of_modernbert_is_drawn_for(tmp_path):
    """An encoder lacks both layers of the head; a masked language model has the first."""
    name = readers.save(tmp_path / "bare", "modernbert", head=False)
    heads = [
        load.load_reader(name, "--student", new_head_seed=seed).model.reader for seed in (1, 2)
    ]
    assert heads[0].head.dense.weight.std().item() == pytest.approx(0.3, rel=0.2)
    assert not torch.equal(heads[0].head.dense.weight, heads[1].head.dense.weight)
    assert torch.equal(heads[0].head.norm.weight, torch.ones(16))
    config = heads[0].config
    masked = AutoModelForMaskedLM.from_config(config)
    masked.save_pretrained(tmp_path / "masked")
    readers.make("modernbert")[1].save_pretrained(tmp_path / "masked")
    with pytest.raises(UserError, match="no question-answering head"):
        load.load_reader(str(tmp_path / "masked"), "--teacher")
    loaded = load.load_reader(str(tmp_path / "masked"), "--student", new_head_seed=1)
    assert torch.equal(loaded.model.reader.head.dense.weight, masked.head.dense.weight)
    assert loaded.model.head.weight.std() > 0.1 and not loaded.model.head.bias.any()


@pytest.mark.parametrize(
    ("kept", "kinds", "every"),
    [([0, 1, 2, 3], "FSSF", 3), ([0, 3], "FF", 1), ([0, 1], "FS", 2), ([0, 3, 4], "FFS", 0)],
)
def test_kept_layers_of_modernbert_look_as_far_as_they_did(tmp_path, kept, kinds, every):
    """The windows are longer than its near layers reach. FSSFSS are the kinds of all layers."""
    name = readers.save(tmp_path / "whole", "jhu-clsp/mmBERT-base", layers=6, local_attention=8)
    part = load.load_reader(name, "--student")
    reaches = [layer.attn.sliding_window for layer in part.model.reader.model.layers]
    load.keep_layers(part, kept, name)
    reader = part.model.reader
    assert "".join(kind[0] for kind in reader.config.layer_types).upper() == kinds
    assert reader.config.global_attn_every_n_layers == every
    assert [layer.attn.sliding_window for layer in reader.model.layers] == [
        reaches[k] for k in kept
    ]
    reader.save_pretrained(tmp_path / "part")
    plain = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "part").eval()
    ids, mask = ids_of(reader, (40, 31))
    with torch.no_grad():
        found, theirs = part.model.eval()(ids, mask), plain(ids, mask.long())
        again = load.load_reader(
            str(tmp_path / "part"), "--student", tokenizer=part.tokenizer
        ).model.eval()(ids, mask)
    assert torch.equal(found, again)
    torch.testing.assert_close(found[..., 0][mask], theirs.start_logits[mask])


def test_layers_that_cannot_stand_first(tmp_path):
    name = readers.save(tmp_path, "modernbert", layers=3)
    with pytest.raises(UserError, match="unlike the others: let the list begin with 0"):
        load.keep_layers(load.load_reader(name, "--student"), [1, 2], name)


def fault(name, **arguments):
    with pytest.raises(UserError) as caught:
        load.load_reader(name, "--teacher", **arguments)
    return str(caught.value)


def test_faults_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no config.json" in fault(str(tmp_path))
    assert "is a file" in fault(__file__)
    assert "neither a folder nor a model" in fault("nobody/has-this-model")
    assert "neither a folder nor a model" in fault("not a name!!")
    assert "no question-answering head" in fault(readers.save(tmp_path / "headless", head=False))

    name = readers.save(tmp_path / "other")
    config = json.loads((tmp_path / "other/config.json").read_text())
    for key, value, words in (
        ("model_type", "vit", "type vit, for which transformers has no question-answering"),
        ("is_decoder", True, "has a decoder"),
        ("num_labels", 3, "3 labels"),
    ):
        changed = {k: v for k, v in config.items() if k not in ("id2label", "label2id")}
        (tmp_path / "other/config.json").write_text(json.dumps({**changed, key: value}))
        assert words in fault(name)
    (tmp_path / "other/config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert "lacks" in fault(name)
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    weights = tmp_path / "other/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert "does not load" in fault(name)
    weights.unlink()
    assert "does not load" in fault(name)
    (tmp_path / "other/config.json").write_text("{")
    assert "does not load" in fault(name)


def test_a_pickle_is_never_read(tmp_path):
    model, tokenizer = readers.make()
    tokenizer.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert "does not load" in fault(str(tmp_path))


def test_a_missing_tokenizer_is_named(tmp_path):
    name = readers.save(tmp_path)
    for path in tmp_path.glob("*token*"):
        path.unlink()
    assert "tokenizer" in fault(name)


def test_layers_that_are_not_there(tmp_path):
    name = readers.save(tmp_path / "b")
    with pytest.raises(UserError, match="has layers 0 to 1"):
        load.keep_layers(load.load_reader(name, "--teacher"), [0, 5], name)
    shared = readers.save(tmp_path / "a", "albert")
    with pytest.raises(UserError, match="shares one layer"):
        load.keep_layers(load.load_reader(shared, "--teacher"), [0], shared)


@pytest.mark.parametrize(("model_type", "longest"), [("bert", 512), ("roberta", 512)])
def test_windows_longer_than_the_model_reads(tmp_path, model_type, longest):
    loaded = load.load_reader(readers.save(tmp_path, model_type), "--student")
    load.check_fits(loaded, longest, "it")
    loaded.model.eval()(torch.full((1, longest), 7))
    with pytest.raises(UserError, match=f"reads {longest} tokens"):
        load.check_fits(loaded, longest + 1, "it")
    loaded.model.reader.resize_token_embeddings(50)
    with pytest.raises(UserError, match="tokenizer of it"):
        load.check_fits(loaded, 10, "it")
