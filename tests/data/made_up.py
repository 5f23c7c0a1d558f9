"""Made-up examples, and helpers that tests of windows share."""

import json
import random

import numpy as np

from kdfast.config import WindowSettings
from kdfast.data.cache import ARRAYS
from kdfast.data.examples import Answer, Example

SMALL = WindowSettings(max_seq_length=48, max_query_length=24, doc_stride=7)

TEXT = (
    "the Normans were people who in the 10th century gave their name to Normandy , a region in "
    "France . Rollo 1066 naïve 在罗洛大军 عاصمة فرنسا 😀 👩\u200d🚀 x-ray ( 620 ) unknown Ж"
)
WORDS = TEXT.split()


def words(draw, n):
    """n words between single or double blanks, tabs or line ends, sometimes at the ends too."""
    blanks = [" "] * 8 + ["  ", "\n", "\t", "\u00a0"]
    text = "".join(draw.choice(WORDS) + draw.choice(blanks) for _ in range(n))
    return draw.choice(["", "", " "]) + (text if draw.random() < 0.3 else text.rstrip())


def random_examples(seed, contexts=25, per_context=3):
    draw = random.Random(seed)
    found = []
    for c in range(contexts):
        context = words(draw, draw.choice([1, 5, 20, 60, 90]))
        for q in range(per_context):
            question, answers = f"who {words(draw, 1)} {c}", ()
            if draw.random() < 0.7:
                start = draw.choice([i for i, c in enumerate(context) if not c.isspace()])
                text = context[start : start + draw.choice([1, 4, 9, 25])]
                answers = (Answer(text, start), Answer(context[0], 0))
            found.append(Example(f"{c}-{q}", "", question, context, answers))
    return found


def write_source(path, examples):
    """Writes a list of flat records; returns its name as `prepare` takes it."""
    rows = [
        {
            "id": e.id,
            "question": e.question,
            "context": e.context,
            "answers": [{"text": a.text, "answer_start": a.start} for a in e.answers],
        }
        for e in examples
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def characters(w, index):
    """The (first, past) characters of all context tokens of a window, int (count, 2)."""
    positions = w.prefix[index] + np.arange(w.count[index])
    return np.stack(w.char_span(index, positions, positions), 1)


def arrays_of(w):
    return {name: getattr(w, name) for name in ARRAYS if hasattr(w, name)}


def assert_same_windows(a, b):
    for name, array in arrays_of(a).items():
        np.testing.assert_array_equal(array, getattr(b, name), err_msg=name)
        assert array.dtype == getattr(b, name).dtype
    assert list(a.question_ids) == list(b.question_ids)
    known = a.counts.keys() & b.counts.keys()  # a source also counts what was read of it
    assert {key: a.counts[key] for key in known} == {key: b.counts[key] for key in known}
    assert a.tally.first == b.tally.first
