"""What may stand for a word, against one forward pass a word, and a search by hand."""

import pytest
import torch
from transformers import AutoModelForMaskedLM

from kdfast.common.errors import UserError
from kdfast.synthetic import proposals
from kdfast.synthetic.proposals import FirstOf, MaskedModel, Neighbours
from kdfast.synthetic.words import is_other, words_of
from tests import readers

TEXTS = ["the man saw the city in the year of war and peace", "a river", ""]


@pytest.fixture(scope="module", params=["bert", "roberta", "xlm-roberta"])
def masked(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    reader, tokenizer = readers.make(request.param)
    torch.manual_seed(1)
    model = AutoModelForMaskedLM.from_config(reader.config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), model.eval(), tokenizer


def words_in(texts):
    return [words_of(text) for text in texts]


def test_a_masked_model_proposes_as_by_itself(masked, monkeypatch):
    """With one mask in a pass, and with windows of a few tokens, against a call for each word."""
    name, model, tokenizer = masked
    monkeypatch.setattr(proposals, "MASKED_AT_ONCE", 10**6)
    texts = ["city the, year", TEXTS[0], TEXTS[2]]
    own = MaskedModel(name, 4)
    found = own.propose(texts, words_in(texts))
    assert [len(each) for each in found] == [3, 12, 0]
    checked = 0
    for text, words, of_text in zip(texts, words_in(texts), found, strict=True):
        for word, best in zip(words, of_text, strict=True):
            ids = tokenizer(text, return_offsets_mapping=True)
            spans = ids["offset_mapping"]
            at = [
                n
                for n, (start, end) in enumerate(spans)
                if start < word.end() and end > word.start() and end > start
            ]
            if len(at) != 1 or ids["input_ids"][at[0]] not in own._words:
                assert best == []
                continue
            row = torch.tensor([ids["input_ids"]])
            row[0, at[0]] = tokenizer.mask_token_id
            with torch.inference_mode():
                logits = model(row).logits[0, at[0]]
            order = logits.argsort(descending=True).tolist()
            ranked = [own._words[each] for each in order if each in own._words]
            ranked = [each for each in ranked[:16] if is_other(each, word[0])]
            assert best == ranked[:4]
            checked += 1
    assert checked > 3


def test_long_texts_are_cut_into_windows(masked, monkeypatch):
    own = MaskedModel(masked[0], 3)
    long = " ".join(TEXTS[0] for _ in range(60))
    assert len(own.tokenizer(long)["input_ids"]) > own._most
    (found,) = own.propose([long], words_in([long]))
    widths = {len(row.ids) for row in own._rows([long], words_in([long]))}
    assert max(widths) <= own._most + 2
    assert any(found[-12:]) and any(found[:12])


def test_neighbours_are_the_nearest(tmp_path):
    name = readers.save(tmp_path / "model")
    model, tokenizer = readers.make()
    found = Neighbours.of_embeddings(name, 3)
    matrix = torch.nn.functional.normalize(model.get_input_embeddings().weight.detach(), dim=1)
    word = next(each for each in found.words if each.isalpha())
    row = tokenizer.convert_tokens_to_ids(word)
    order = (matrix @ matrix[row]).argsort(descending=True).tolist()
    spelled = {
        tokenizer.convert_tokens_to_ids(each): each for each in found.words if is_other(each, word)
    }
    nearest = [spelled[each] for each in order if each in spelled][:3]
    assert found.propose([word], words_in([word])) == [[nearest]]
    assert found.propose(["qqqqq"], words_in(["qqqqq"])) == [[[]]]


def test_vectors_in_text_form(tmp_path):
    path = tmp_path / "glove.txt"
    rows = {"king": [1, 0], "queen": [0.9, 0.1], "prince": [0.8, 0.3], "tree": [0, 1], "42": [1, 0]}
    body = "".join(f"{word} {x} {y}\n" for word, (x, y) in rows.items())
    for text in (body, f"{len(rows)} 2\n{body}"):
        path.write_text(text)
        found = Neighbours.of_file(path, 2)
        assert found.propose(["King, 42"], words_in(["King, 42"])) == [[["queen", "prince"], []]]
    path.write_text(f"{body}. . . 1 1\nat name@domain.com 0 1\n")  # as GloVe 840B has them
    assert Neighbours.of_file(path, 2).words[-2:] == [". . .", "at name@domain.com"]
    for broken in ("king 1 0\nqueen 1\n", "king 1 0\nqueen x 1\n", "king nan 0\n", "", "king\n"):
        path.write_text(broken)
        with pytest.raises(UserError, match=r"--vectors .*glove\.txt"):
            Neighbours.of_file(path, 2)
    with pytest.raises(UserError, match="cannot be read"):
        Neighbours.of_file(tmp_path / "none", 2)


def test_the_first_that_knows_a_word(tmp_path):
    one = Neighbours(["a", "b"], torch.eye(2), 1)
    two = Neighbours(["a", "c", "d"], torch.tensor([[1.0, 0], [0, 1], [1, 1]]), 1)
    assert FirstOf([one, two]).propose(["a c e"], words_in(["a c e"])) == [[["b"], ["d"], []]]


def test_models_that_cannot_propose(tmp_path):
    name = readers.save(tmp_path / "reader")
    with pytest.raises(UserError, match=r"--masked_model .* lacks .* weights, such as cls"):
        MaskedModel(name, 3)
    with pytest.raises(UserError, match=r"--embeddings .*nowhere"):
        Neighbours.of_embeddings(str(tmp_path / "nowhere"), 3)
