"""Models that transformers 4 saved: kdfast reads the tokens and gives the answers that it gave.

And what kdfast writes of them, transformers 4 and 5 read as the same model.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from kdfast import Reader
from kdfast.config import WindowSettings
from kdfast.data.examples import Example
from kdfast.data.prepare import windows_of
from kdfast.models.load import keep_layers, load_reader
from kdfast.models.save import save_model
from kdfast.tokenizers.load import load_tokenizer
from tests import families, readers

pytestmark = pytest.mark.program

ROOT = Path(__file__).parents[1]
GOLDEN = families.golden()
TEXTS = GOLDEN["texts"]
# Small readers of these, cut down to some layers, are written by kdfast alone.
NEW = {"distilbert-base-uncased": [1, 3], "jhu-clsp/mmBERT-base": [0, 1]}
every_family = pytest.mark.parametrize("name", families.NAMES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return families.unpack(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def written(folders, tmp_path_factory):
    """The folders that kdfast writes of them, under a umask of 027."""
    home = tmp_path_factory.mktemp("written")
    before = os.umask(0o027)
    try:
        for name in families.NAMES:
            loaded = load_reader(str(folders / name), "--student")
            save_model(home / name, loaded.model, loaded.tokenizer)
        for name, layers in NEW.items():
            made = readers.save(home / "made" / name, name, layers=4)
            loaded = load_reader(made, "--student")
            keep_layers(loaded, layers, made)
            save_model(home / Path(name).name, loaded.model, loaded.tokenizer)
    finally:
        os.umask(before)
    return home


def ids_of(tokenizer):
    """text -> the ids of the whole pair, as the tokenizer's backend puts them together."""
    return {text: tokenizer.backend_tokenizer.encode(*pair).ids for text, pair in TEXTS.items()}


def check_answers(name, ask, asked=None):
    """Compare the golden answers with those of ask(text, settings), for settings among `asked`."""
    for case in GOLDEN["families"][name]["answers"]:
        if asked is not None and case["settings"] not in asked:
            continue
        found = ask(case["text"], case["settings"])
        both = [each if isinstance(each, list) else [each] for each in (found, case["answers"])]
        for one, other in zip(*both, strict=True):
            where = f"{case['text']}, {case['settings']}"
            assert one["score"] == pytest.approx(other["score"], rel=1e-3), where
            assert {**one, "score": 0} == {**other, "score": 0}, where


@every_family
def test_ids(folders, name):
    tokenizer = load_tokenizer(folders / name, "--student")
    assert ids_of(tokenizer) == GOLDEN["families"][name]["ids"]
    # Published DeBERTas have no embeddings for the types that their tokenizer gives.
    typed = GOLDEN["families"][name]["token_types"] and "deberta" not in name
    assert ("token_type_ids" in tokenizer.model_input_names) == typed


@every_family
def test_windows_hold_these_ids(folders, name):
    tokenizer = load_tokenizer(folders / name, "--student")
    examples = [Example(text, "", *pair, None) for text, pair in TEXTS.items()]
    windows = windows_of(examples, tokenizer, WindowSettings(2000, 500))
    used = "token_type_ids" in tokenizer.model_input_names
    for index, (text, pair) in enumerate(TEXTS.items()):
        row = windows.padded([index])
        assert row["input_ids"][0].tolist() == GOLDEN["families"][name]["ids"][text], text
        types = tokenizer.backend_tokenizer.encode(*pair).type_ids
        assert np.array_equal(row["token_type_ids"][0], np.array(types) * used)


@every_family
def test_answers(folders, name):
    reader = Reader(folders / name)
    check_answers(name, lambda text, settings: reader(*TEXTS[text], **settings))


@every_family
def test_ids_from_vocabulary_files(folders, tmp_path, name):
    expected = GOLDEN["families"][name]["bare"]
    for pattern in ("config.json", "vocab.txt", "vocab.json", "merges.txt", "*.model"):
        for path in (folders / name).glob(pattern):
            shutil.copy(path, tmp_path)
    if expected["settings"] is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(expected["settings"]))
    made = load_tokenizer(tmp_path, "--student")
    assert ids_of(made) == expected["ids"]
    for text, ids in GOLDEN["families"][name].get("sentencepiece", {}).items():
        context = made.backend_tokenizer.encode(TEXTS[text][1], add_special_tokens=False)
        assert context.ids == ids, text
    made.save_pretrained(tmp_path / "written")
    shutil.copy(tmp_path / "config.json", tmp_path / "written")
    assert ids_of(load_tokenizer(tmp_path / "written", "--student")) == expected["ids"]


@every_family
def test_what_is_written(folders, written, name):
    files = {path.name: path for path in (written / name).iterdir()}
    assert set(files) == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.values()} == {0o640}
    read = (folders / name / "tokenizer.json").read_bytes()
    assert files["tokenizer.json"].read_bytes() == read
    settings = json.loads(files["tokenizer_config.json"].read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "input_ids" in settings["model_input_names"]
    machine = {"is_local", "local_files_only", "backend", "name_or_path", "tokenizer_file"}
    assert not machine & set(settings)
    # Transformers 5, and kdfast, read the same again.
    again = load_tokenizer(written / name, "--student")
    five = AutoTokenizer.from_pretrained(written / name)
    assert ids_of(again) == ids_of(five) == GOLDEN["families"][name]["ids"]
    assert again.model_input_names == five.model_input_names == settings["model_input_names"]
    before = load_tokenizer(folders / name, "--student")
    for key in ("special_tokens_map", "model_max_length", "extra_special_tokens"):
        ours, theirs, first = (getattr(each, key) for each in (again, five, before))
        assert str(ours) == str(theirs) == str(first)


@pytest.fixture(scope="module")
def four(written):
    """What transformers 4 makes of the written folders."""
    if not (ROOT / ".transformers4" / "transformers").is_dir():
        pytest.skip("transformers 4 is not installed: `make .transformers4` does so")
    asked = {
        "folders": {path.name: str(path) for path in written.iterdir() if path.name != "made"},
        "texts": TEXTS,
        "settings": [{}, {"top_k": 3, "handle_impossible_answer": True}],
    }
    done = subprocess.run(
        # -I: next to the script there is a tokenizers.py, which is not the library.
        [sys.executable, "-I", str(ROOT / "tests" / "transformers4_answers.py")],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return asked["settings"], json.loads(done.stdout)


@every_family
def test_transformers_4_reads_what_is_written(four, name):
    settings, found = four
    assert found[name]["ids"] == GOLDEN["families"][name]["ids"]

    def ask(text, wanted):
        return found[name]["answers"][text][settings.index(wanted)]

    check_answers(name, ask, settings)


@pytest.mark.parametrize("name", [Path(each).name for each in NEW])
def test_transformers_4_reads_what_it_knows_by_other_names(four, written, name):
    """The kinds of layers and their rotary bases, which transformers 5 saves otherwise."""
    settings, found = four
    ask = Reader(written / name)
    for text, pair in TEXTS.items():
        ours = [ask(*pair, **each) for each in settings]
        theirs = found[name]["answers"][text]
        for one, other in zip(_flat(ours), _flat(theirs), strict=True):
            assert one["score"] == pytest.approx(other["score"], rel=1e-3, abs=1e-12), text
            assert one["answer"] == other["answer"], text


def _flat(answers):
    return [each for one in answers for each in (one if isinstance(one, list) else [one])]
