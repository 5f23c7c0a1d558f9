"""The door to tokenizers: what decides token types, what counts where files disagree, mistakes."""

import json
import re
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from transformers.convert_slow_tokenizer import SpmConverter
from transformers.utils import sentencepiece_model_pb2_new

import kdfast
from kdfast import predict
from kdfast.common.errors import UserError
from kdfast.tokenizers.load import load_tokenizer, uses_token_types
from kdfast.tokenizers.template import Template
from tests import families

TYPED = ["input_ids", "token_type_ids", "attention_mask"]
UNTYPED = ["input_ids", "attention_mask"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return families.unpack(tmp_path_factory.mktemp("families"))


@pytest.fixture
def folder(saved, tmp_path):
    """folder(name, model settings, tokenizer settings): a copy of a family's, so changed.

    None deletes a setting; the tokenizer's settings are replaced, where they are given.
    """

    def copy(name: str, model: dict | None = None, tokenizer: dict | None = None) -> Path:
        target = tmp_path / name
        shutil.copytree(saved / name, target)
        config = json.loads((target / "config.json").read_text()) | (model or {})
        config = {key: value for key, value in config.items() if value is not None}
        (target / "config.json").write_text(json.dumps(config))
        if tokenizer is not None:
            (target / "tokenizer_config.json").write_text(json.dumps(tokenizer))
            (target / "special_tokens_map.json").unlink(missing_ok=True)
        return target

    return copy


@pytest.mark.parametrize(
    "name, model, tokenizer, typed",
    [
        # No embeddings for two types: none, whatever is stated.
        ("deberta-v2", {}, {"model_input_names": TYPED}, False),
        ("klue", {}, {"tokenizer_class": "BertTokenizer", "model_input_names": TYPED}, False),
        ("mpnet", {"type_vocab_size": 2}, {"tokenizer_class": "BertTokenizer"}, False),
        # Stated.
        ("bert", {}, {"model_input_names": UNTYPED}, False),
        ("albert", {"transformers_version": "5.24.0"}, {"model_input_names": TYPED}, True),
        # Written by transformers 4, or by who knows what.
        ("albert", {}, {}, True),
        ("albert", {"transformers_version": None}, {}, True),
        ("bert", {"transformers_version": "4.6.0.dev0"}, {}, True),
        ("electra", {}, {}, True),
        ("deberta-v2", {"type_vocab_size": 2}, {}, True),
        ("bert", {}, {"tokenizer_class": "PreTrainedTokenizerFast"}, True),
        ("bert", {}, {"tokenizer_class": "DistilBertTokenizerFast"}, False),
        # The default of this setting is 2 where config.json leaves it out.
        ("bert", {"type_vocab_size": None}, {}, True),
        ("klue", {"type_vocab_size": None}, {"tokenizer_class": "BertTokenizer"}, True),
        ("klue", {"type_vocab_size": 2}, {"tokenizer_class": "RobertaTokenizer"}, False),
        # Written by transformers 5.
        ("albert", {"transformers_version": "5.24.0"}, {}, False),
        ("bert", {"transformers_version": "5.0.0"}, {}, True),
        ("electra", {"transformers_version": "5.0.0"}, {}, True),
        (
            "bert",
            {"transformers_version": "5.24.0"},
            {"tokenizer_class": "TokenizersBackend"},
            False,
        ),
        # The class stands in config.json, as klue/roberta-base has it.
        ("klue", {"type_vocab_size": 2, "tokenizer_class": "BertTokenizer"}, {}, True),
    ],
)
def test_token_types(folder, name, model, tokenizer, typed):
    found = folder(name, model, tokenizer)
    assert uses_token_types(found) == typed
    assert Template.learn(load_tokenizer(found, "--student")).uses_token_types == typed


def replace_part(folder: Path, **parts) -> Tokenizer:
    """Set parts of the backend in tokenizer.json; returns it."""
    path = folder / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    for part, value in parts.items():
        setattr(backend, part, value)
    backend.save(str(path))
    return Tokenizer.from_file(str(path))


NFKC = normalizers.NFKC()
DIGITS = pre_tokenizers.Digits(individual_digits=True)


@pytest.mark.parametrize(
    "name, parts",
    [
        ("bert", {"normalizer": normalizers.Sequence([NFKC, normalizers.BertNormalizer()])}),
        ("bert", {"normalizer": NFKC}),
        (
            "electra",
            {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), DIGITS])},
        ),
        (
            "roberta",
            {"pre_tokenizer": pre_tokenizers.Sequence([DIGITS, pre_tokenizers.ByteLevel()])},
        ),
        ("roberta", {"normalizer": NFKC}),
        ("deberta", {"normalizer": normalizers.Lowercase()}),
        ("xlm-roberta", {"normalizer": normalizers.Sequence([NFKC, normalizers.Lowercase()])}),
        ("camembert", {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="never")}),
        ("deberta-v2", {"normalizer": NFKC}),
        ("albert", {"normalizer": NFKC}),
    ],
)
def test_the_file_is_used_as_it_stands(folder, name, parts):
    found = folder(name)
    backend = replace_part(found, **parts)
    tokenizer = load_tokenizer(found, "--student")
    for pair in families.golden()["texts"].values():
        ours, file = tokenizer.backend_tokenizer.encode(*pair), backend.encode(*pair)
        assert (ours.ids, ours.offsets) == (file.ids, file.offsets)
    tokenizer.save_pretrained(found / "again")
    read = (found / "tokenizer.json").read_bytes()
    assert (found / "again" / "tokenizer.json").read_bytes() == read


def test_stated_settings_go_into_the_file_as_in_transformers_4(folder):
    # Transformers 4.57.6 gave these: lower case is stated, and accents then fall with it.
    found = folder("bert", tokenizer={"do_lower_case": False, "strip_accents": True})
    normalizer = load_tokenizer(found, "--student").backend_tokenizer.normalizer
    assert not normalizer.lowercase and normalizer.strip_accents
    # Nothing is stated: the file counts, though the class lower-cases by default.
    replace_part(found, normalizer=normalizers.BertNormalizer(lowercase=False))
    (found / "tokenizer_config.json").write_text("{}")
    assert not load_tokenizer(found, "--student").backend_tokenizer.normalizer.lowercase


def test_prefix_space_is_what_is_stated_else_what_the_file_says(folder):
    found = folder("roberta", tokenizer={"add_prefix_space": True, "trim_offsets": False})
    backend = load_tokenizer(found, "--student").backend_tokenizer
    assert backend.pre_tokenizer.add_prefix_space
    assert backend.post_processor.add_prefix_space and not backend.post_processor.trim_offsets
    replace_part(found, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))
    (found / "tokenizer_config.json").write_text("{}")
    tokenizer = load_tokenizer(found, "--student")
    assert tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space
    tokenizer.save_pretrained(found / "again")
    assert json.loads((found / "again" / "tokenizer_config.json").read_text())["add_prefix_space"]


def test_a_mask_that_the_vocabulary_lacks_gets_the_next_id(folder):
    # DeBERTa-v3's SentencePiece model holds [PAD], [CLS], [SEP] and [UNK]; its mask comes after.
    found = folder("deberta-v2", tokenizer={"do_lower_case": False, "vocab_type": "spm"})
    (found / "added_tokens.json").unlink()
    (found / "tokenizer.json").unlink()
    tokenizer = load_tokenizer(found, "--student")
    assert (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.mask_token_id) == (0, 1, 400)


def test_a_class_adds_no_token_that_the_file_does_not_know(folder):
    found = folder("bert", tokenizer={"do_lower_case": True})
    state = json.loads((found / "tokenizer.json").read_text())
    state["model"]["vocab"]["[M]"] = state["model"]["vocab"].pop("[MASK]")
    state["added_tokens"] = [each for each in state["added_tokens"] if each["content"] != "[MASK]"]
    (found / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = load_tokenizer(found, "--student")
    assert len(tokenizer) == len(state["model"]["vocab"]) and tokenizer.mask_token is None


def test_a_padding_token_that_only_the_model_names(folder):
    found = folder("roberta", tokenizer={"tokenizer_class": "PreTrainedTokenizerFast"})
    assert load_tokenizer(found, "--student").pad_token == "<pad>"


def test_added_tokens_and_additional_special_tokens_are_kept(folder):
    found = folder("bert", tokenizer={"additional_special_tokens": ["[Q]"], "pad_token": "[SEP]"})
    (found / "added_tokens.json").write_text(json.dumps({"Dornow": 520}))
    tokenizer = load_tokenizer(found, "--student")
    assert tokenizer.pad_token_id == tokenizer.sep_token_id
    assert tokenizer.convert_tokens_to_ids(["Dornow", "[Q]"]) == [
        len(tokenizer) - 2,
        len(tokenizer) - 1,
    ]
    tokenizer.save_pretrained(found / "again")
    shutil.copy(found / "config.json", found / "again")
    again = load_tokenizer(found / "again", "--student")
    text = "[Q] Who is from Dornow?"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.extra_special_tokens == ["[Q]"]


def test_a_tokenizer_that_was_changed_is_written_as_it_is(folder):
    tokenizer = load_tokenizer(folder("roberta"), "--student")
    tokenizer.add_tokens([AddedToken("Dornow")])
    target = folder("bert") / "again"
    tokenizer.save_pretrained(target)
    written = Tokenizer.from_file(str(target / "tokenizer.json"))
    assert written.encode("In Dornow").ids == tokenizer("In Dornow")["input_ids"]
    assert written.token_to_id("Dornow") == len(tokenizer) - 1


def test_damaged_and_missing_tokenizers_are_named(folder):
    found = folder("klue", tokenizer={"tokenizer_class": "BertJapaneseTokenizer"})
    (found / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"BertJapaneseTokenizer cannot be made .*tokenizer\.json"):
        load_tokenizer(found, "--teacher")
    found = folder("deberta-v2")
    (found / "tokenizer.json").unlink()
    (found / "spm.model").unlink()
    with pytest.raises(UserError, match=r"--teacher .*neither tokenizer\.json nor spm\.model"):
        load_tokenizer(found, "--teacher")
    (found / "spm.model").write_bytes(b"\x00 no model")
    with pytest.raises(UserError, match="has no tokenizer that loads"):
        load_tokenizer(found, "--teacher")
    found = folder("bert")
    (found / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match="has no tokenizer that loads"):
        load_tokenizer(found, "--teacher")


def test_sentencepiece_models_that_cannot_be_converted(folder, monkeypatch):
    found = folder("xlm-roberta")
    (found / "tokenizer.json").unlink()
    path = found / "sentencepiece.bpe.model"
    proto = sentencepiece_model_pb2_new.ModelProto.FromString(path.read_bytes())
    proto.trainer_spec.model_type = 2
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match=r"\(sentencepiece\.bpe\.model\) that is no unigram model"):
        load_tokenizer(found, "--student")

    def no_protobuf(*_):
        raise ImportError("protobuf")

    monkeypatch.setattr(SpmConverter, "__init__", no_protobuf)
    with pytest.raises(UserError, match="pip install protobuf"):
        load_tokenizer(found, "--student")


def test_token_types_of_an_unknown_pattern_are_refused(folder):
    found = folder("bert")
    backend = Tokenizer.from_file(str(found / "tokenizer.json"))
    state = json.loads(backend.to_str())
    state["post_processor"]["pair"][0]["SpecialToken"]["type_id"] = 1
    (found / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="token types"):
        Template.learn(load_tokenizer(found, "--student"))


def test_tokenizers_are_loaded_in_one_place_only():
    package = Path(kdfast.__file__).parent
    others = [
        str(path)
        for path in package.rglob("*.py")
        if re.search(r"AutoTokenizer\.|import [^\n]*AutoTokenizer", path.read_text("utf-8"))
    ]
    assert not others


LEVEL = {"type": "WordLevel", "vocab": {f"a{n}": n for n in range(9)}, "unk_token": "nope"}
PAIRS = {
    "type": "BPE",
    "vocab": {"a": 0, "b": 1, "ab": 2},
    "merges": ["a b"],
    "continuing_subword_prefix": "é",
}
ENDLESS = {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""}
FAR = {"type": "BertProcessing", "sep": ["[SEP]", 2], "cls": ["[CLS]", 2**32 - 1]}
# tokenizer.json of a folder, changed so that `tokenizers` panics, raises a bare Exception or would
# go through four thousand million ids: as it loads, as a pair is encoded, at a text of a thread.
FAULTS = {
    "a merge inside a character": ({"model": PAIRS}, "no tokenizer that loads"),
    "a map of characters that is none": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8AAAAA"}},
        r"fails at a text \(index out of bounds",
    ),
    "an id far out": (
        {"model": LEVEL | {"vocab": {"a": 0, "[UNK]": 2**32 - 1}}},
        "holds the id 4294967295",
    ),
    "an id around a pair": ({"post_processor": FAR}, "puts the id 4294967295 around a pair"),
    "no unknown token": ({"model": LEVEL}, r"fails at a text \(.*UNK"),
    "a pattern without an end": ({"normalizer": ENDLESS}, r"fails at a text \(Onig"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_panic_is_a_sentence(folder, fault, tmp_path, capfd):
    change, sentence = FAULTS[fault]
    model = folder("bert")
    content = json.loads((model / "tokenizer.json").read_text()) | change
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=sentence):
        kdfast.Reader(model)("Who?", f"{60 * 'x'} was Rollo.")
    capfd.readouterr()
    flags = ["--question", "Who?", "--context", f"{60 * 'x'} was Rollo."]
    assert predict.main(["--model", str(model), *flags]) == 2
    out, err = capfd.readouterr()
    assert out == "" and "Traceback" not in err  # Rust's own words may stand before it
    assert re.match(f"error: .*{sentence}", err.splitlines()[-1])


def test_an_id_without_an_embedding_is_refused(folder):
    """One is enough, however few tokens there are."""
    model = folder("bert")
    content = json.loads((model / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[list(vocabulary)[-1]] = 10**6
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="has ids up to 1000000, and the model has embeddings"):
        kdfast.Reader(model)
