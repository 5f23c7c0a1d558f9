"""Labels, and the way from tokens back to characters."""

import unicodedata

import numpy as np
import pytest

from kdfast.config import WindowSettings
from kdfast.data.examples import Answer, Example
from kdfast.data.prepare import windows_of
from kdfast.data.read import read_examples
from tests.corpora import shared
from tests.data.made_up import SMALL, characters, random_examples
from tests.small_tokenizers import FAMILIES, of_family


@pytest.mark.parametrize("family", FAMILIES)
def test_real_answers_come_back_from_their_labels(family):
    for name in ("xquad_zh", "covidqa_long_dev", "newwiki_dev"):
        path = shared(f"{name}.json")
        examples = read_examples(str(path))[:150]
        w = windows_of(examples, of_family(family))
        inside = np.flatnonzero(w.start_positions > 0)
        assert set(w.question[inside]) == set(w.question[w.trainable])
        first, past = w.char_span(inside, w.start_positions[inside], w.end_positions[inside])
        for q, low, high in zip(w.question[inside], first, past, strict=True):
            text = examples[q].answers[0].text.strip()
            assert text in examples[q].context[low:high]
            # At most the rest of the words in which the answer begins and ends. (Unigram models
            # make one token of a run of unknown characters.)
            if family not in ("xlm_roberta", "deberta_v2"):
                assert high - low <= len(text) + 24


def expected_labels(example, spans):
    """By definition: first and last token that hold the answer's outer characters."""
    text = example.answers[0].text
    low = example.answers[0].start + len(text) - len(text.lstrip())
    high = low + len(text.strip())
    first = min((t for t, (_, past) in enumerate(spans) if past > low), default=None)
    last = max((t for t, (begin, _) in enumerate(spans) if begin < high), default=None)
    return (first, last) if None not in (first, last) and first <= last else None


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_by_definition(family):
    examples = random_examples(2, contexts=40)
    w = windows_of(examples, of_family(family), SMALL)
    tokens = {}  # of each question's context, from all its windows
    for i in range(len(w)):
        for t, span in enumerate(characters(w, i).tolist()):
            tokens.setdefault(w.question[i], {})[w.first_token[i] + t] = span
    labels = {}
    for q, example in enumerate(examples):
        if example.answers:
            labels[q] = expected_labels(example, [tokens[q][t] for t in range(len(tokens[q]))])
    held = {
        q
        for i, q in enumerate(w.question.tolist())
        if (label := labels.get(q))
        and w.first_token[i] <= label[0] <= label[1] < w.first_token[i] + w.count[i]
    }
    edges = 0
    for i in range(len(w)):
        q = w.question[i]
        example, first, count = examples[q], w.first_token[i], w.count[i]
        label = (w.start_positions[i], w.end_positions[i])
        if not example.answers:
            assert label == (0, 0) and w.trainable[i]
            continue
        found = labels[q]
        assert w.trainable[i] == (q in held)
        if found and first <= found[0] and found[1] < first + count:
            shift = w.prefix[i] - first
            assert label == (found[0] + shift, found[1] + shift)
            edges += found[0] == first or found[1] == first + count - 1
        else:
            assert label == (0, 0)
    assert edges > 20


def test_labels_at_the_edges_of_a_window():
    """Every word of a context as the answer: exactly the windows that hold it are labelled."""
    tokenizer = of_family("bert")
    text = "the normans were people in france " * 6
    length = len(tokenizer(text, add_special_tokens=False).input_ids)
    starts = [i for i in range(len(text)) if text[i] != " " and (i == 0 or text[i - 1] == " ")]
    answers = [Answer(text[s:].split(" ")[0], s) for s in starts]
    examples = [Example(str(i), "", "who", text, (a,)) for i, a in enumerate(answers)]
    settings = WindowSettings(24, 4, 5)
    w = windows_of(examples, tokenizer, settings)
    room = 24 - 3 - len(tokenizer("who", add_special_tokens=False).input_ids)
    first = list(range(0, length - room + 5, 5))
    assert w.first_token[w.question == 0].tolist() == first
    assert (w.first_token + w.count)[w.question == 0].tolist() == [
        min(f + room, length) for f in first
    ]
    for i in range(len(w)):
        answer = answers[w.question[i]]
        spans = characters(w, i)
        holds = spans[0, 0] <= answer.start and answer.start + len(answer.text) <= spans[-1, 1]
        assert (w.start_positions[i] > 0) == holds
        if holds:
            low, high = w.char_span(i, w.start_positions[i], w.end_positions[i])
            assert text[low:high] == answer.text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "answer",
    [
        "😀",
        "👩\u200d🚀",
        "👍🏽",
        "在罗洛",
        "عاصمة فرنسا",
        "cafe\u0301",
        "e\u0323\u0301t",
        "naïve",
        "हिन्दी",
        "Straße",
        "1,000.5",
    ],
)
def test_spans_map_back_to_the_exact_characters(family, answer):
    context = f"They say : {answer} , at the\t end ."
    start = context.index(answer)
    example = Example("a", "", "what", context, (Answer(answer, start),))
    w = windows_of([example], of_family(family))
    low, high = w.char_span(0, w.start_positions[0], w.end_positions[0])
    assert unicodedata.normalize("NFC", context[low:high]) == unicodedata.normalize("NFC", answer)
    assert context[low:high] == answer


def test_only_a_mark_that_no_token_holds_is_added_to_the_one_before():
    context = "cafe\u0301 ok"
    example = Example("a", "", "what", context, ())
    held = characters(windows_of([example], of_family("roberta")), 0)
    assert [3, 4] in held.tolist()
    assert [4, 5] in held.tolist()
    loose = characters(windows_of([example], of_family("deberta_v2")), 0)
    assert [3, 5] in loose.tolist()
    assert 4 not in loose[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_with_outer_blanks(family):
    context = "They were \n people of Normandy ."
    for text, start in ((" \n people ", 9), ("people", 12), ("\npeople", 12)):
        w = windows_of(
            [Example("a", "", "who", context, (Answer(text, start),))], of_family(family)
        )
        low, high = w.char_span(0, w.start_positions[0], w.end_positions[0])
        assert context[low:high] == "people"
        assert w.counts["moved"] == 0


def test_kinds_of_gold():
    context = "Rollo led the Normans . Rollo came from Denmark in 1066 ."
    gold = {
        "answered": (Answer("Normans", 14), Answer("Rollo", 0)),
        "moved": (Answer("Denmark", 30),),
        "nearest": (Answer("Rollo", 3),),
        "not unique": (Answer("Rollo", 12),),
        "not there": (Answer("Robert", 0),),
        "second": (Answer("Robert", 0), Answer("Rollo", 0)),
        "impossible": (),
        "unlabelled": None,
    }
    examples = [Example(name, "", "who", context, answers) for name, answers in gold.items()]
    w = windows_of(examples, of_family("bert"))
    assert list(w.question_ids) == list(gold)
    labels = {}
    for i, name in enumerate(w.question_ids):
        start, end = w.start_positions[i], w.end_positions[i]
        low, high = w.char_span(i, start, end) if start > 0 else (0, 0)
        labels[name] = (context[low:high] or int(start), bool(w.trainable[i]))
    assert labels == {
        "answered": ("Normans", True),
        "moved": ("Denmark", True),
        "nearest": ("Rollo", True),
        "not unique": (0, False),
        "not there": (0, False),
        "second": ("Rollo", True),
        "impossible": (0, True),
        "unlabelled": (-100, True),
    }
    assert w.end_positions[-1] == -100
    expected = {"questions": 8, "moved": 2, "later_answer": 1, "unanswerable": 1, "unlabelled": 1}
    expected |= {"absent": 1, "ambiguous": 1, "no_token": 0, "longer_than_window": 0}
    assert {k: w.counts[k] for k in expected} == expected
    assert w.tally.first["moved"] == ["moved", "nearest"]
    assert [note.split()[0] for note in w.notes()] == ["1", "1", "2", "1", "1"]
    assert w.notes(training=False) == []


def test_an_answer_that_no_window_holds_is_left_out_and_its_flags_are_named():
    words = [f"{letter}{n}" for letter in "abcd" for n in range(10)]
    context = " ".join(words)
    settings = WindowSettings(23, 4, 7)
    tokenizer = of_family("bert")
    room = windows_of([Example("a", "", "who", context, ())], tokenizer, settings).count[0]
    heads = [Example(f"{n}", "", "who", " ".join(words[:n]), ()) for n in range(1, 20)]
    longest = int((windows_of(heads, tokenizer).count <= room).sum())
    assert 1 < longest < 19
    examples = []
    for n in (1, longest, longest + 1, len(words)):
        examples.append(Example(f"{n}", "", "who", context, (Answer(" ".join(words[:n]), 0),)))
    w = windows_of(examples, tokenizer, settings)
    kept = {name: bool(w.trainable[w.question == q].all()) for q, name in enumerate(w.question_ids)}
    assert list(kept.values()) == [True, True, False, False]
    assert not w.trainable[w.question >= 2].any() and not w.start_positions[w.question >= 2].any()
    assert w.counts["longer_than_window"] == 2 and w.counts["unanswerable"] == 0
    (note,) = w.notes()
    assert "--max_seq_length is 23 and --doc_stride 7" in note
    assert f"({longest + 1}, {len(words)})" in note
    assert w.notes(training=False) == []


def test_an_answer_of_characters_that_no_token_holds_is_left_out():
    context = "the \u200b\u200b people"
    w = windows_of([Example("a", "", "who", context, (Answer("\u200b", 4),))], of_family("bert"))
    assert (w.start_positions[0], w.trainable[0]) == (0, False)
    # The whole context may be such.
    w = windows_of([Example("a", "", "who", "\u200b", (Answer("\u200b", 0),))], of_family("bert"))
    assert (w.count[0], w.start_positions[0], w.trainable[0]) == (0, 0, False)
