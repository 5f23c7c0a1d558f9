"""The cache of windows, and the settings and tokenizers that are refused."""

import json
import shutil
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from kdfast.common.errors import UserError
from kdfast.data import features, prepare, windowing
from kdfast.data.cache import FORMAT, HEADER, cache_folder
from kdfast.data.examples import Answer, Example
from kdfast.data.prepare import prepare_windows, windows_of
from kdfast.data.read import read_examples
from kdfast.tokenizers.template import tokenizer_key
from tests.corpora import shared
from tests.data.made_up import (
    SMALL,
    assert_same_windows,
    characters,
    random_examples,
    write_source,
)
from tests.small_tokenizers import FAMILIES, of_family


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source.json", random_examples(7))


def names(cache):
    return sorted(p.name for p in (cache / "features").iterdir())


def test_a_hit_maps_and_parses_nothing(tmp_path, source, monkeypatch):
    tokenizer = of_family("roberta")
    cache = tmp_path / "cache"
    first = prepare_windows(source, tokenizer, cache_dir=cache, settings=SMALL)
    assert_same_windows(windows_of(random_examples(7), tokenizer, SMALL), first)
    assert names(cache) == [f"{first.key}-{FORMAT}", f"{first.key}-{FORMAT}.lock"]

    def never(*args, **options):
        raise AssertionError("parsed")

    monkeypatch.setattr(features, "iter_examples", never)
    monkeypatch.setattr(windowing.WindowBuilder, "arrays", never)
    copy = tmp_path / "copy.json"  # the name does not matter, the content does
    shutil.copy(source, copy)
    again = prepare_windows(str(copy), FAMILIES["roberta"](), cache_dir=str(cache), settings=SMALL)
    assert_same_windows(first, again)
    assert (again.key, again.settings) == (first.key, asdict(SMALL))
    base = again.input_ids
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    assert type(again.input_ids[[0, 1]]) is np.ndarray


def test_the_key_follows_data_tokenizer_and_settings(tmp_path, source):
    cache = tmp_path / "cache"
    roberta = of_family("roberta")
    keys = {prepare_windows(source, roberta, cache_dir=cache, settings=SMALL).key}
    other = write_source(tmp_path / "other.json", random_examples(8))
    keys.add(prepare_windows(other, roberta, cache_dir=cache, settings=SMALL).key)
    for name, value in asdict(SMALL).items():
        changed = replace(SMALL, **{name: value - 1})
        keys.add(prepare_windows(source, roberta, cache_dir=cache, settings=changed).key)
    for tokenizer in (of_family("bert"), FAMILIES["roberta"](399)):
        keys.add(prepare_windows(source, tokenizer, cache_dir=cache, settings=SMALL).key)
    assert len(keys) == 7


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_key_survives_saving(tmp_path, family):
    import transformers

    tokenizer = of_family(family)
    tokenizer.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_key(loaded) == tokenizer_key(tokenizer)
    loaded.add_tokens(["newword"])
    assert tokenizer_key(loaded) != tokenizer_key(tokenizer)


@pytest.mark.parametrize("damage", ["short", "long", "missing", "header", "no header", "other key"])
def test_a_torn_cache_is_refused(tmp_path, source, damage):
    cache = tmp_path / "cache"
    tokenizer = of_family("bert")
    key = prepare_windows(source, tokenizer, cache_dir=cache, settings=SMALL).key
    folder = cache_folder(cache, key)
    array, header = folder / "input_ids.npy", folder / HEADER
    if damage == "short":
        array.write_bytes(array.read_bytes()[:-4])
    elif damage == "long":
        array.write_bytes(array.read_bytes() + b"\0\0\0\0")
    elif damage == "missing":
        array.unlink()
    elif damage == "header":
        header.write_text(header.read_text()[:-30])
    elif damage == "no header":
        header.unlink()
    else:
        header.write_text(header.read_text().replace(key, "0" * 64))
    with pytest.raises(UserError, match=r"a damaged cache .*: delete this folder") as caught:
        prepare_windows(source, tokenizer, cache_dir=cache, settings=SMALL)
    assert str(folder) in str(caught.value)


def test_a_killed_preparation_leaves_nothing_that_is_read(tmp_path, source, monkeypatch):
    cache = tmp_path / "cache"
    tokenizer = of_family("bert")

    class Killed(BaseException):
        pass

    def die(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_sums", die)
        patch.setattr(prepare, "remove", lambda path: None)  # nobody cleans up
        with pytest.raises(Killed):
            prepare_windows(source, tokenizer, cache_dir=cache, settings=SMALL)
    (left,) = [n for n in names(cache) if n.endswith(".partial")]
    (cache / "features" / left / "input_ids.npy").write_bytes(b"rubbish")
    w = prepare_windows(source, tokenizer, cache_dir=cache, settings=SMALL)
    assert_same_windows(windows_of(random_examples(7), tokenizer, SMALL), w)
    assert names(cache) == [f"{w.key}-{FORMAT}", f"{w.key}-{FORMAT}.lock"]


def test_two_at_once_write_once(tmp_path, source, monkeypatch):
    cache = tmp_path / "cache"
    writes, found = [], []
    real = prepare._write

    def slow(*args):
        writes.append(threading.get_ident())
        time.sleep(0.2)
        real(*args)

    monkeypatch.setattr(prepare, "_write", slow)

    def work(tokenizer):
        found.append(prepare_windows(source, tokenizer, cache_dir=cache, settings=SMALL))

    threads = [threading.Thread(target=work, args=(FAMILIES["roberta"](),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(writes) == 1


def test_a_fault_in_the_data_leaves_nothing(tmp_path, source):
    Path(source).write_text("\n".join(map(json.dumps, json.loads(Path(source).read_text()))) + "{")
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match="not JSON"):
        prepare_windows(source, of_family("bert"), cache_dir=cache, settings=SMALL)
    assert [n for n in names(cache) if not n.endswith(".lock")] == []


def test_a_full_disk(tmp_path, source):
    import resource

    cache = tmp_path / "cache"
    tokenizer = of_family("bert")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # a real write that really fails
    try:
        with pytest.raises(UserError) as caught:
            prepare_windows(source, tokenizer, cache_dir=cache, settings=SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(cache) in str(caught.value)
    assert "cannot be written there" in str(caught.value)
    assert [n for n in names(cache) if not n.endswith(".lock")] == []
    assert len(prepare_windows(source, tokenizer, cache_dir=cache, settings=SMALL)) > 0


def test_a_cache_folder_that_cannot_be(tmp_path, source):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache_dir .*file/cache: features cannot be written"):
        prepare_windows(source, of_family("bert"), SMALL, cache_dir=tmp_path / "file" / "cache")


def stored_per_token(cache, windows):
    """Bytes of the features and of the teacher's logits, two in fp16, for every real token."""
    stored = sum(p.stat().st_size for p in cache.rglob("*") if p.is_file())
    return stored / len(windows.input_ids) + 4


@pytest.mark.parametrize("vocabulary", [300, 70_000])
def test_bytes_on_disk(tmp_path, vocabulary):
    """At most 12 for every real token, also with one question a context and many ids."""
    tokenizer = FAMILIES["bert"]()
    examples = read_examples(str(shared("newwiki_dev.json")))
    contexts = {e.context[:300]: e for e in examples}  # a window each
    added = [f"unheardof{i}" for i in range(vocabulary)]
    tokenizer.add_tokens(added)
    asked = f"{added[-1]} "
    once = [Example(e.id, e.title, asked + e.question, c, ()) for c, e in contexts.items()]
    source = write_source(tmp_path / "once.json", once)
    w = prepare_windows(source, tokenizer, cache_dir=tmp_path / "cache")
    assert w.input_ids.dtype == (np.uint16 if vocabulary < 1 << 16 else np.int32)
    assert w.counts["windows"] == w.counts["questions"] == w.counts["contexts"]
    assert stored_per_token(tmp_path / "cache", w) <= 12


def test_arrays_widen_where_values_ask_for_it(tmp_path, monkeypatch):
    """Ids above 65,535, characters above 65,535, words of over 255 characters: late in the file."""
    tokenizer = FAMILIES["bert"]()
    tokenizer.add_tokens([f"unheardof{i}" for i in range(70_000)])
    examples = random_examples(6)
    long = "the " * 17_000 + "x" * 300 + " Rollo " + "y" * 66_000
    examples.append(
        Example("z", "", "unheardof69999", long, (Answer("Rollo", long.index("Rollo")),))
    )
    examples += [replace(e, id=f"{e.id}-again") for e in random_examples(6, 2)]
    monkeypatch.setattr(windowing, "_BATCH_QUESTIONS", 8)
    source = write_source(tmp_path / "source.json", examples)
    w = prepare_windows(source, tokenizer, cache_dir=tmp_path / "cache", settings=SMALL)
    assert_same_windows(windows_of(examples, tokenizer, SMALL), w)
    for name in ("input_ids", "context_char_start", "context_char_count"):
        assert getattr(w, name).dtype == np.int32
    assert w.question_char_count.dtype == np.uint8
    at = np.flatnonzero(w.question == len(random_examples(6)))
    (inside,) = at[w.start_positions[at] > 0][:1]
    first, past = w.char_span(inside, w.start_positions[inside], w.end_positions[inside])
    assert long[first:past] == "Rollo"
    assert max(past for i in at for _, past in characters(w, i)) == len(long)
    assert w.padded(at[:1])["input_ids"][0, 1] == len(tokenizer) - 1
    narrow = prepare_windows(
        write_source(tmp_path / "narrow.json", random_examples(6)),
        tokenizer,
        cache_dir=tmp_path / "cache",
        settings=SMALL,
    )
    assert [narrow.input_ids.dtype, narrow.context_char_start.dtype] == [np.uint16, np.uint16]
    np.testing.assert_array_equal(w.input_ids[: len(narrow.input_ids)], narrow.input_ids)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"doc_stride": 22}, "--doc_stride 22: more than the 21 tokens"),
        ({"max_query_length": 45}, "--max_query_length 45 and 3 special tokens leave no room"),
        ({"max_query_length": 200}, "leave no room for a context"),
        ({"doc_stride": 0}, "--doc_stride 0: give a positive number"),
        ({"max_query_length": -1}, "--max_query_length -1"),
        ({"max_seq_length": 0}, "--max_seq_length 0"),
    ],
)
def test_settings_that_leave_gaps(tmp_path, source, settings, part):
    for call in (
        lambda **s: prepare_windows(source, of_family("bert"), cache_dir=tmp_path / "c", **s),
        lambda **s: windows_of([], of_family("bert"), **s),
    ):
        with pytest.raises(UserError) as caught:
            call(settings=replace(SMALL, **settings))
        assert part in str(caught.value)


def test_tokenizers_that_are_refused(tmp_path, source):
    import tokenizers
    import transformers

    class Slow(transformers.PythonBackend):
        vocab_size = 1

        def get_vocab(self):
            return {"a": 0}

        def _tokenize(self, text):
            return list(text)

    with pytest.raises(UserError, match="Slow: a slow tokenizer"):
        prepare_windows(source, Slow(), cache_dir=tmp_path)

    def wrapped(**special):
        backend = tokenizers.Tokenizer.from_str(of_family("bert").backend_tokenizer.to_str())
        backend.post_processor = tokenizers.processors.TemplateProcessing(pair="$A $B")
        return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)

    with pytest.raises(UserError, match="no padding token"):
        prepare_windows(source, wrapped(), cache_dir=tmp_path)
    with pytest.raises(UserError, match="no token in front"):
        prepare_windows(source, wrapped(pad_token="[PAD]"), cache_dir=tmp_path)
    turned = FAMILIES["bert"]()
    turned.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        pair="[CLS]:1 $A:1 [SEP]:1 $B:0 [SEP]:0",
        special_tokens=[("[CLS]", turned.cls_token_id), ("[SEP]", turned.sep_token_id)],
    )
    with pytest.raises(UserError, match="0 up to the context and 1"):
        tokenizer_key(turned)
