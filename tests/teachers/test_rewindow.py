import shutil
from dataclasses import replace

import numpy as np
import pytest

from kdfast.common.errors import UserError
from kdfast.common.files import SUMS_FILE, write_sums
from kdfast.config import WindowSettings
from kdfast.data.cache import cache_folder
from kdfast.data.prepare import prepare_windows, windows_of
from kdfast.data.read import read_examples
from kdfast.data.windows import Windows
from kdfast.teachers import rewindow
from kdfast.tokenizers.template import Template
from tests.corpora import shared
from tests.data.made_up import SMALL, characters, random_examples
from tests.small_tokenizers import of_family
from tests.teachers.two_tokenizers import aligner, by_pattern, write


@pytest.fixture
def made(tmp_path):
    """made(student, teacher, examples, **settings): the student's windows, and the teacher's."""

    def make(student, teacher, examples, *, length=60, stride=20, **changes):
        source = str(tmp_path / "asked.json")
        write(source, [(each.id, each.question, each.context) for each in examples])
        student = prepare_windows(
            source, student, replace(SMALL, **changes), cache_dir=tmp_path / "cache"
        )
        settings = WindowSettings(length, doc_stride=stride)
        return student, rewindow.rewindow(
            student, source, teacher, settings, cache_dir=tmp_path / "cache"
        )

    return make


def windows_of_whole(tokenizer, examples):
    return windows_of(examples, tokenizer, rewindow.WHOLE)


def assert_same_characters(student, found, tokenizer, examples):
    """The teacher's windows are as its tokenizer makes pairs, and hold the tokens they must."""
    w, template = found.windows, Template.learn(tokenizer)
    whole = windows_of_whole(tokenizer, examples)
    assert len(found.first) == len(student) + 1 and found.first[-1] == len(w)
    for window in range(len(student)):
        question = int(student.question[window])
        spans = characters(whole, question)
        held = np.zeros(len(spans), dtype=bool)
        if student.count[window]:
            low, high = characters(student, window)[0, 0], characters(student, window)[-1, 1]
            held = (spans[:, 1] > low) & (spans[:, 0] < high)
        seen = np.zeros(len(spans), dtype=bool)
        ids = whole.padded([question])["input_ids"][0]
        for number in range(found.first[window], found.first[window + 1]):
            assert w.question[number] == question
            first, count, prefix = (int(a[number]) for a in (w.first_token, w.count, w.prefix))
            seen[first : first + count] = True
            asked = prefix - len(template.before) - len(template.between)
            at = len(template.before)
            row = w.padded([number])
            assert row["input_ids"][0].tolist() == [
                *template.before,
                *ids[at : at + asked],
                *template.between,
                *ids[whole.prefix[question] :][first : first + count],
                *template.after,
            ]
            types = row["token_type_ids"][0]
            assert types[:prefix].sum() == 0
            assert types[prefix:].all() == w.uses_token_types
            np.testing.assert_array_equal(characters(w, number), spans[first : first + count])
        np.testing.assert_array_equal(seen, held)
    assert list(w.question_ids) == [each.id for each in examples]


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("roberta", "bert"), ("bert", "xlm_roberta"), ("deberta_v2", "deberta")],
)
def test_the_teachers_windows_hold_the_same_characters(made, monkeypatch, student, teacher):
    blocks = Windows.question_blocks
    monkeypatch.setattr(Windows, "question_blocks", lambda self: blocks(self, 7))
    monkeypatch.setattr(rewindow, "_VALUES_AT_ONCE", 50)
    examples = random_examples(4, contexts=10)
    windows, found = made(of_family(student), of_family(teacher), examples, length=22)
    assert_same_characters(windows, found, of_family(teacher), examples)
    assert len(found.windows) > len(windows) > 7
    assert found.windows.lengths.max() <= 22


def test_the_teachers_windows_are_full_spread_evenly_and_overlap(made):
    tokenizer = of_family("roberta")
    examples = random_examples(5, contexts=6)
    found = made(of_family("bert"), tokenizer, examples, length=40, stride=9)[1]
    w = found.windows
    many = np.flatnonzero(np.diff(found.first) > 2)
    assert len(many)
    for window in many:
        own = slice(found.first[window], found.first[window + 1])
        assert (w.lengths[own] == 40).all()
        steps = np.diff(w.first_token[own])
        room = int(w.count[own][0])
        assert np.ptp(steps) <= 1 and 0 < steps.max() <= max(min(9, room // 2), 1)


def test_the_teacher_reads_the_characters_of_a_cut_question():
    student = by_pattern("a", "b", "cd", "e", "x", pattern="(?<=d)| ")
    teacher = by_pattern("a", "b", "c", "d", "e", "x", pattern="(?<=[cd])| ")
    found = aligner(student, teacher, [("a b cde", "x"), ("", "x")], max_query_length=3).teacher
    # The student reads a, b and cd; e is beyond what it keeps.
    assert found.windows.question_token_start.tolist() == [0, 4, 4]
    assert found.windows.prefix.tolist() == [6, 2]
    assert found.windows.counts["truncated_questions"] == 0


def test_a_question_takes_half_of_a_window_at_most():
    tokenizer = by_pattern("a", "x")
    made = aligner(tokenizer, by_pattern("x", "a"), [("a " * 20, "x " * 9)], teacher_length=13)
    w = made.teacher.windows
    assert w.prefix.tolist() == [2 + 5] * len(w) and w.counts["truncated_questions"] == 1
    assert w.count.tolist() == [5, 5, 5]


def test_the_cache_is_used_and_keyed(made, monkeypatch, tmp_path):
    examples = random_examples(6, contexts=3)
    student, teacher = of_family("bert"), of_family("roberta")
    windows, found = made(student, teacher, examples)
    first = np.array(found.first)
    keys = {windows.key, found.windows.key}
    keys.add(made(student, teacher, examples, length=50)[1].windows.key)
    keys.add(made(student, teacher, examples, stride=19)[1].windows.key)
    keys.add(made(student, of_family("deberta"), examples)[1].windows.key)
    keys.add(made(student, teacher, examples, doc_stride=6)[1].windows.key)
    assert len(keys) == 6
    monkeypatch.setattr(rewindow.Rewindower, "arrays", None)
    again = made(student, teacher, examples)[1]
    np.testing.assert_array_equal(again.first, first)
    np.testing.assert_array_equal(again.windows.input_ids, found.windows.input_ids)

    folder = cache_folder(tmp_path / "cache", found.windows.key)
    for wrong in (first[:-1], first + 1, first[::-1]):
        np.save(folder / "first_piece.npy", wrong)
        write_sums(folder, [path.name for path in folder.iterdir() if path.name != SUMS_FILE])
        with pytest.raises(UserError, match=r"damaged cache .first_piece is not of"):
            made(student, teacher, examples)
    shutil.rmtree(folder)
    monkeypatch.undo()
    np.testing.assert_array_equal(made(student, teacher, examples)[1].first, first)


def test_a_killed_writer_leaves_nothing(made, monkeypatch, tmp_path):
    examples = random_examples(7, contexts=3)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(rewindow.Rewindower, "_block", killed)
    with pytest.raises(KeyboardInterrupt):
        made(of_family("bert"), of_family("roberta"), examples)
    names = {path.name for path in (tmp_path / "cache" / "features").iterdir() if path.is_dir()}
    assert len(names) == 2  # the student's windows, and the teacher's of whole contexts
    monkeypatch.undo()
    made(of_family("bert"), of_family("roberta"), examples)


@pytest.mark.parametrize("name", ["xquad_zh", "covidqa_long_dev"])
def test_real_files(made, name):
    examples = read_examples(str(shared(f"{name}.json")))[:3]
    settings = {"max_seq_length": 384, "max_query_length": 64, "doc_stride": 128}
    tokenizer = of_family("xlm_roberta")
    windows, found = made(
        of_family("roberta"), tokenizer, examples, length=512, stride=128, **settings
    )
    assert_same_characters(windows, found, tokenizer, examples)
