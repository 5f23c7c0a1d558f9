"""Windows against the usual route of the tokenizer itself, and what is gathered from them."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from kdfast.common.errors import UserError
from kdfast.config import WindowSettings
from kdfast.data import windowing
from kdfast.data.examples import Example
from kdfast.data.prepare import windows_of
from kdfast.data.read import read_examples
from kdfast.tokenizers.template import Template, tokenizer_key
from tests.corpora import shared
from tests.data.made_up import SMALL, TEXT, assert_same_windows, characters, random_examples
from tests.small_tokenizers import FAMILIES, of_family


def hf_windows(tokenizer, example, max_seq_length, stride):
    """The usual route: its `stride` is the overlap, so it depends on the question's length."""
    question = tokenizer(example.question, add_special_tokens=False).input_ids
    special = tokenizer.num_special_tokens_to_add(pair=True)
    return tokenizer(
        example.question,
        example.context,
        truncation="only_second",
        max_length=max_seq_length,
        stride=max_seq_length - special - len(question) - stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def assert_same_as_hf(tokenizer, examples, settings):
    w = windows_of(examples, tokenizer, settings)
    assert w.counts["truncated_questions"] == 0
    at = 0
    for number, example in enumerate(examples):
        expected = hf_windows(tokenizer, example, settings.max_seq_length, settings.doc_stride)
        for i, ids in enumerate(expected["input_ids"]):
            row = w.padded([at])
            assert row["input_ids"][0].tolist() == ids
            # Where a pair has type 0 throughout, the library still gives type 1 to the contexts of
            # second and later windows; ours are like the first.
            if "token_type_ids" in expected and (w.uses_token_types or i == 0):
                assert row["token_type_ids"][0].tolist() == expected["token_type_ids"][i]
            side = expected.sequence_ids(i)
            offsets = [o for o, s in zip(expected["offset_mapping"][i], side, strict=True) if s]
            assert (w.question[at], w.prefix[at], w.count[at]) == (
                number,
                side.index(1) if 1 in side else len(ids) - 1,
                len(offsets),
            )
            for (first, past), (low, high) in zip(characters(w, at), offsets, strict=True):
                usual, ours = example.context[low:high], example.context[first:past]
                assert ours == (usual.lstrip() or usual)
            at += 1
    assert at == len(w)
    return w


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_equal_the_usual_route(family):
    w = assert_same_as_hf(of_family(family), random_examples(1), SMALL)
    assert w.counts["windows"] > 5 * w.counts["contexts"]
    assert w.uses_token_types == (family in ("bert", "deberta_v2"))


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_that_overlap_equal_the_usual_route(family):
    """Its `stride` is that overlap, whatever the question's length is."""
    tokenizer, examples = of_family(family), random_examples(2)
    w = windows_of(examples, tokenizer, WindowSettings(48, 24), overlap=7)
    usual = [
        ids
        for e in examples
        for ids in tokenizer(
            e.question,
            e.context,
            truncation="only_second",
            max_length=48,
            stride=7,
            return_overflowing_tokens=True,
        )["input_ids"]
    ]
    assert len(usual) == len(w) > 1.5 * len(examples)
    assert [w.padded([i])["input_ids"][0].tolist() for i in range(len(w))] == usual


def test_an_overlap_that_leaves_nothing_new():
    tokenizer = of_family("bert")
    examples = [Example("a", "", "who were the people ?", "the people " * 30, None)]
    room = 48 - 5 - Template.learn(tokenizer).size
    settings = WindowSettings(48, 24)
    w = windows_of(examples, tokenizer, settings, overlap=room - 1)
    assert np.diff(w.first_token).tolist() == [1] * (60 - room)
    w = windows_of(examples, tokenizer, settings, overlap=room)  # half of it is shared instead
    assert set(np.diff(w.first_token).tolist()) == {room - room // 2}
    short = [Example("a", "", "who were the people ?", "the people", None)]
    with np.errstate(all="raise"):
        assert len(windows_of(short, tokenizer, settings, overlap=room)) == 1
    with pytest.raises(UserError, match="leaves 0 of 8 tokens"):
        windows_of(short, tokenizer, WindowSettings(8, 24), overlap=0)


def test_windows_equal_the_usual_route_on_real_files():
    settings = WindowSettings(384, 160, 128)
    draw = random.Random(0)
    for family, name, number in (("bert", "covidqa_long_dev", 3), ("roberta", "xquad_zh", 40)):
        path = shared(f"{name}.json")
        examples = draw.sample(read_examples(str(path)), number)
        w = assert_same_as_hf(of_family(family), examples, settings)
        assert len(w) > number


def test_the_widest_step_leaves_no_gap():
    settings = replace(SMALL, doc_stride=21)
    assert_same_as_hf(of_family("bert"), random_examples(9, 8), settings)
    w = windows_of([Example("a", "", "the " * 30, "people " * 90, ())], of_family("bert"), settings)
    assert (w.count[:-1] == 21).all()
    assert w.first_token[-1] + w.count[-1] == w.context_token_start[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_long_questions_are_cut(family):
    tokenizer = of_family(family)
    question = "who were the Normans and when did they come to France " * 3
    examples = [Example("a", "", question, "the people " * 40, ()), Example("b", "", "", "x", ())]
    w = windows_of(examples, tokenizer, SMALL)
    assert w.counts["truncated_questions"] == 1
    ids = tokenizer(question, add_special_tokens=False).input_ids[:24]
    template = Template.learn(tokenizer)
    for i in range(len(w) - 1):
        row = w.padded([i])["input_ids"][0].tolist()
        assert row[: w.prefix[i]] == [*template.before, *ids, *template.between]
        assert len(row) <= 48
    assert w.prefix[-1] == len(template.before) + len(template.between)  # no question at all
    assert w.question_token_start.tolist() == [0, 24, 24]
    assert len(w.question_char_start) == 24


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_has_the_characters_of_a_context(family):
    texts = [f"{TEXT}  cafe\u0301 x", "the  naive\u0308", "e\u0301"]
    examples = [Example(text, "", text, text, ()) for text in texts]
    examples.append(Example("none", "", "", "x", ()))
    w = windows_of(examples, of_family(family), WindowSettings(max_query_length=200))
    kept = w.question_token_start[-1]
    assert kept == w.context_token_start[3] > 40
    np.testing.assert_array_equal(w.question_char_start, w.context_char_start[:kept])
    np.testing.assert_array_equal(w.question_char_count, w.context_char_count[:kept])


def test_padded():
    w = windows_of(random_examples(3), of_family("bert"), SMALL)
    draw = np.random.default_rng(0)
    indices = draw.integers(len(w), size=30)
    for width in (None, 48, 64):
        got = w.padded(indices, width)
        wide = width or w.lengths[indices].max()
        assert {k: (v.dtype, v.shape) for k, v in got.items()} == {
            "input_ids": (np.int64, (30, wide)),
            "attention_mask": (np.bool_, (30, wide)),
            "token_type_ids": (np.int64, (30, wide)),
        }
        for row, i in enumerate(indices):
            n, rest = w.lengths[i], wide - w.lengths[i]
            ids = w.input_ids[w.window_start[i] : w.window_start[i + 1]]
            assert got["input_ids"][row].tolist() == [*ids, *[w.pad_token_id] * rest]
            assert got["attention_mask"][row].tolist() == [True] * n + [False] * rest
            types = [0] * w.prefix[i] + [1] * (n - w.prefix[i]) + [0] * rest
            assert got["token_type_ids"][row].tolist() == types
    with pytest.raises(ValueError, match="width 5 is less"):
        w.padded(indices, 5)
    assert w.padded([])["input_ids"].shape == (0, 0)
    roberta = windows_of(random_examples(3, 2), of_family("roberta"), SMALL)
    assert not roberta.padded([0, 1])["token_type_ids"].any()


def test_batches_do_not_matter(monkeypatch):
    examples = random_examples(4)
    whole = windows_of(examples, of_family("xlm_roberta"), SMALL)
    monkeypatch.setattr(windowing, "_BATCH_QUESTIONS", 2)
    assert_same_windows(windows_of(examples, of_family("xlm_roberta"), SMALL), whole)


def test_a_batch_has_a_bound(monkeypatch):
    """By its contexts, by their questions, and by what these ask of them together."""
    monkeypatch.setattr(windowing, "_BATCH_CHARACTERS", 200)
    monkeypatch.setattr(windowing, "_BATCH_CHARACTERS_ASKED", 1000)
    monkeypatch.setattr(windowing, "_BATCH_QUESTIONS", 20)

    def sizes(lengths):
        contexts = {n: "x" * n for n in lengths}
        examples = [Example("", "", "", contexts[n], ()) for n in lengths]
        batches = list(windowing._batches(examples))
        assert [e for batch in batches for e in batch] == examples
        return [len(batch) for batch in batches]

    assert sizes([90, 91, 92, 93, 94]) == [3, 2]
    assert sizes([90] * 3 + [500] * 5) == [5, 2, 1]
    assert sizes([1] * 50) == [20, 20, 10]


def test_each_context_is_tokenised_once(monkeypatch):
    """However its questions are spread: in the file's order, and shuffled over many batches."""
    real = of_family("roberta")
    texts = []

    class Spy:
        def __getattr__(self, name):
            return getattr(real.backend_tokenizer, name)

        def encode_batch(self, batch, **options):
            texts.extend(batch)
            return real.backend_tokenizer.encode_batch(batch, **options)

    spied = SimpleNamespace(
        is_fast=True,
        pad_token_id=real.pad_token_id,
        model_input_names=real.model_input_names,
        backend_tokenizer=Spy(),
    )
    examples = random_examples(5, contexts=20, per_context=4)
    in_order = windows_of(examples, real, SMALL)
    monkeypatch.setattr(windowing, "_BATCH_QUESTIONS", 8)
    shuffled = random.Random(0).sample(examples, len(examples))
    w = windows_of(shuffled, spied, SMALL)
    contexts = {e.context for e in examples}
    assert sorted(t for t in texts if t in contexts) == sorted(contexts)
    assert w.counts["contexts"] == len(contexts)
    assert len(w.context_char_start) == len(in_order.context_char_start)

    def per_question(windows_):
        found = {}
        for i, q in enumerate(windows_.question):
            row = [windows_.padded([i])["input_ids"][0].tolist(), characters(windows_, i).tolist()]
            label = [int(windows_.start_positions[i]), int(windows_.end_positions[i])]
            found.setdefault(windows_.question_ids[q], []).append(row + label)
        return found

    assert per_question(w) == per_question(in_order)


def test_the_tokenizer_is_left_as_it_was():
    tokenizer = FAMILIES["bert"]()
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(5, stride=1)
    backend.enable_padding(length=7)
    before = backend.truncation, backend.padding
    key = tokenizer_key(tokenizer)
    w = windows_of(random_examples(6, 3), tokenizer, SMALL)
    assert w.lengths.max() == 48
    assert (backend.truncation, backend.padding) == before
    backend.no_truncation()
    assert tokenizer_key(tokenizer) == key
