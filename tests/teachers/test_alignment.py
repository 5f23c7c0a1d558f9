import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kdfast.teachers.alignment import softened
from tests.data.made_up import WORDS
from tests.small_tokenizers import FAMILIES, of_family
from tests.teachers.two_tokenizers import aligner, by_pattern, by_the_book, by_wordpiece

TEMPERATURE = 2.0
WORDWISE = by_pattern("who", "?", "Rollo", "ruled", "New", "York", ".")


def aligned(made, start, end, windows=None):
    """What arrives, each column (tokens, 2), where the teacher's softmax is `start` and `end`."""
    mass = np.array([start, end], dtype=float).T
    logits = TEMPERATURE * np.log(mass)
    return made.align(logits, 0, windows or len(made.student), TEMPERATURE)


def shares(n):
    """n masses, all different, whose sum is 1; and their reverse."""
    one = 2.0 * np.arange(1, n + 1) / (n * (n + 1))
    return one, one[::-1]


def expect(made, start, end):
    """start, end: for each token of the student, the teacher's tokens whose mass it gets."""
    columns = [shares(n) for n in made.teacher.windows.lengths]
    p, q = (np.concatenate(each) for each in zip(*columns, strict=True))
    found = aligned(made, p, q)
    wanted = [[sum(m[i] for i in each) for each in lists] for m, lists in ((p, start), (q, end))]
    np.testing.assert_allclose(found.T, wanted, rtol=0, atol=1e-12)


def test_a_word_of_the_teacher_split_by_the_student():
    student = by_wordpiece("who", "?", "rol", "##lo", "ru", "##l", "##ed")
    made = aligner(student, WORDWISE, [("who ?", "Rollo ruled")])
    # Teacher: 0 [CLS] 1 who 2 ? 3 [SEP] 4 Rollo 5 ruled 6 [SEP].
    expect(
        made,
        [[0], [1], [2], [3], [4], [], [5], [], [], [6]],
        [[0], [1], [2], [3], [], [4], [], [], [5], [6]],
    )


def test_two_words_of_the_teacher_inside_one_token_of_the_student():
    student = by_pattern("who", "Rollo ruled", "New York", pattern="\\|")
    teacher = by_pattern("who", "Rollo", "ruled", "New", "York", pattern="[ |]")
    made = aligner(student, teacher, [("who", "Rollo ruled|New York")])
    # Teacher: 0 [CLS] 1 who 2 [SEP] 3 Rollo 4 ruled 5 New 6 York 7 [SEP].
    both = [[0], [1], [2], [3, 4], [5, 6], [7]]
    expect(made, both, both)


def test_accents_stripped_composed_or_split_into_bytes():
    context = "cafe\u0301 café x"  # the first in five characters, the second in four
    plain = by_wordpiece("who", "cafe", "x")
    keeps = by_wordpiece("who", "ca", "##f", "##é", "##e\u0301", "x", accents=True)
    made = aligner(keeps, plain, [("who", context)])
    # Teacher: 0 [CLS] 1 who 2 [SEP] 3 cafe 4 cafe 5 x 6 [SEP].
    expect(
        made,
        [[0], [1], [2], [3], [], [], [4], [], [], [5], [6]],
        [[0], [1], [2], [], [], [3], [], [], [4], [5], [6]],
    )
    made = aligner(plain, keeps, [("who", context)])
    both = [[0], [1], [2], [3, 4, 5], [6, 7, 8], [9], [10]]
    expect(made, both, both)


def test_chinese_words_characters_and_bytes():
    characters = by_wordpiece("谁", "罗", "洛", "来", "到")
    wordwise = by_pattern("谁", "罗洛", "来到", pattern="/")
    text = "罗洛/来到"  # the student has [UNK] for the stroke
    made = aligner(characters, wordwise, [("谁", text)])
    # Teacher: 0 [CLS] 1 谁 2 [SEP] 3 罗洛 4 来到 5 [SEP].
    expect(
        made,
        [[0], [1], [2], [3], [], [], [4], [], [5]],
        [[0], [1], [2], [], [3], [], [], [4], [5]],
    )
    # Three bytes a character, all of which hold it: the first takes starts, the last takes ends.
    made = aligner(of_family("roberta"), characters, [("谁", "罗洛")])
    # Teacher: 0 [CLS] 1 谁 2 [SEP] 3 罗 4 洛 5 [SEP]; the student has two </s> between.
    assert made.student.lengths.tolist() == [1 + 3 + 2 + 6 + 1]
    expect(
        made,
        [[0], [1], [], [], [2], [], [3], [], [], [4], [], [], [5]],
        [[0], [], [], [1], [2], [], [], [], [3], [], [], [4], [5]],
    )
    made = aligner(characters, of_family("roberta"), [("谁", "罗洛")])
    both = [[0], [1, 2, 3], [4, 5], [6, 7, 8], [9, 10, 11], [12]]
    expect(made, both, both)


def test_special_tokens_without_a_counterpart_of_their_number():
    one = by_pattern("who", "Rollo")
    three = by_pattern("who", "Rollo", ends=3)
    both = [[0], [1], [2, 3, 4], [5], [6]]
    expect(aligner(one, three, [("who", "Rollo")]), both, both)
    both = [[0], [1], [2], [], [], [3], [4]]
    expect(aligner(three, one, [("who", "Rollo")]), both, both)
    none = by_pattern("who", "Rollo", ends=0)
    both = [[0, 2], [1], [3], [4]]
    expect(aligner(none, one, [("who", "Rollo")]), both, both)


def test_a_window_that_begins_and_ends_inside_a_word():
    student = by_wordpiece("who", "rol", "##lo", "ru", "##l", "##ed")
    # Windows of [CLS] who [SEP] and two of: rol ##lo ru ##l ##ed, then [SEP].
    made = aligner(
        student,
        WORDWISE,
        [("who", "Rollo ruled")],
        max_seq_length=6,
        max_query_length=1,
        doc_stride=1,
    )
    assert made.student.count.tolist() == [2] * 4
    # 0 [CLS] 1 who 2 [SEP] 3 Rollo [4 ruled] and [SEP]; Rollo is in the first two windows.
    assert np.diff(made.teacher.first).tolist() == [1] * 4
    assert made.teacher.windows.count.tolist() == [1, 2, 1, 1]
    masses = [shares(n) for n in made.teacher.windows.lengths]
    p, q = (np.concatenate(each) for each in zip(*masses, strict=True))
    found = aligned(made, p, q).reshape(4, 6, 2)
    second = masses[1]  # ##lo ru: the start of Rollo and the end of ruled are outside
    np.testing.assert_allclose(found[1, :, 0], second[0], atol=1e-12)
    np.testing.assert_allclose(found[1, :, 1], second[1], atol=1e-12)
    third, fourth = masses[2:]  # ru ##l, and ##l ##ed: ruled alone
    np.testing.assert_allclose(found[2, 3:5, 0], [third[0][3], 0], atol=1e-12)
    np.testing.assert_allclose(found[2, 3:5, 1], [0, third[1][3]], atol=1e-12)
    np.testing.assert_allclose(found[3, 3:5, 0], [fourth[0][3], 0], atol=1e-12)
    np.testing.assert_allclose(found[3, 3:5, 1], [0, fourth[1][3]], atol=1e-12)


def test_a_window_that_begins_or_ends_with_empty_tokens():
    # The student: three bytes of 罗, a blank's empty token at 2, 3 and 4 each, three bytes of 洛.
    student, teacher = of_family("roberta"), by_pattern("罗", "洛", " ", pattern="(?<=.)")
    made = aligner(
        student,
        teacher,
        [("", "罗   洛")],
        max_seq_length=10,
        max_query_length=1,
        doc_stride=3,
    )
    assert made.student.first_token.tolist() == [0, 3] and made.student.count.tolist() == [6, 6]
    # Teacher: 0 [CLS] 1 [SEP] 2 罗 3-5 blanks 6 [SEP]; 7 [CLS] 8 [SEP] 9-10 blanks 11 洛 12 [SEP].
    # The character that is nearest, or that a tie gives preference, may be in the other window.
    expect(
        made,
        [
            *([0], [1], [], [2, 3, 4, 5], [], [], [], [], [], [6]),
            *([7], [8], [], [], [], [], [9, 10, 11], [], [], [12]),
        ],
        [
            *([0], [1], [], [], [], [2, 3, 4, 5], [], [], [], [6]),
            *([7], [8], [], [], [], [], [], [], [9, 10, 11], [12]),
        ],
    )


def test_a_window_of_empty_tokens_alone():
    student, teacher = of_family("roberta"), by_pattern("罗", "洛", " ", pattern="(?<=.)")
    lengths = {"max_seq_length": 7, "max_query_length": 1, "doc_stride": 2}
    made = aligner(student, teacher, [("", "罗       洛")], **lengths)
    assert made.student.first_token.tolist() == [0, 2, 4, 6, 8, 10]
    logits = np.random.default_rng(0).normal(0, 3, (len(made.teacher.windows.input_ids), 2))
    found = made.align(logits, 0, len(made.student), TEMPERATURE)
    # The third and the fourth window hold no character: their first token takes all of it.
    for window in range(len(made.student)):
        begin, end = made.student.window_start[window : window + 2]
        wanted = by_the_book(made, logits, window, TEMPERATURE)
        np.testing.assert_allclose(found[begin:end], wanted, rtol=0, atol=1e-12)
    assert (found.reshape(6, 7, 2)[2:4, 4:6] == 0).all()


def test_a_character_that_no_token_of_the_student_holds():
    student = by_pattern("who", "Rollo", "ruled", pattern="[ ,.]")
    teacher = by_pattern("who", "Rollo", ",", ".", "ruled", pattern=" ")
    # The nearest token; halfway between two, the later one for starts, the earlier one for ends.
    for context, start, end in (
        ("Rollo , ruled", 4, 3),
        ("Rollo .  ruled", 3, 3),
        ("Rollo  . ruled", 4, 4),
    ):
        made = aligner(student, teacher, [("who", context)])
        p = np.full(7, 1e-9)
        p[3 + context.split().index(next(c for c in context.split() if c in ",."))] = 1
        p /= p.sum()
        found = aligned(made, p, p)
        assert found.argmax(axis=0).tolist() == [start, end], context
    # What stands outside of all that the student reads, the teacher does not read either.
    made = aligner(student, teacher, [("who", ", Rollo ruled .")])
    assert made.teacher.windows.count.tolist() == [2]


def test_no_token_at_all_means_no_answer():
    student = by_pattern("who", pattern="[ .]")
    teacher = by_pattern("who", ".", pattern=" ")
    made = aligner(student, teacher, [("who", ".")])
    # The student reads no character of the context, so nor does the teacher.
    assert made.student.count.tolist() == made.teacher.windows.count.tolist() == [0]
    found = aligned(made, *shares(len(made.teacher.windows.input_ids)))
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-12)


def test_windows_are_merged_relative_to_no_answer():
    words = [f"w{i}" for i in range(10)]
    student = by_pattern("who", " ".join(words), pattern="\\|")
    teacher = by_pattern("who", *words, pattern="[ |]")
    made = aligner(
        student,
        teacher,
        [("who", " ".join(words))],
        teacher_length=10,
        teacher_stride=3,
    )
    w = made.teacher.windows
    # Six words a window, spread evenly: 0-5, 2-7, 4-9. They meet before words 4 and 6.
    assert w.first_token.tolist() == [0, 2, 4] and w.count.tolist() == [6, 6, 6]
    identity = aligner(teacher, by_pattern("who", *words, pattern="[ |]", ends=1), [("who", "w0")])
    assert identity.student.lengths.tolist() == [5]
    same = aligner(
        by_pattern("who", *words, pattern="[| ]"),
        teacher,
        [("who", " ".join(words))],
        teacher_length=10,
        teacher_stride=3,
    )
    draw = np.random.default_rng(0)
    logits = draw.normal(0, 2, (30, 2))
    relative = logits.reshape(3, 10, 2) - logits.reshape(3, 10, 2)[:, :1]
    context = np.concatenate(
        [relative[0, 3:7], relative[1, 5:7], relative[2, 5:9]]
    )  # words 0-3 of the first, 4-5 of the second, 6-9 of the third
    shared = relative.mean(axis=0)
    merged = np.concatenate([shared[:3], context, shared[9:]])
    wanted = np.exp(merged / TEMPERATURE)
    wanted /= wanted.sum(axis=0)
    found = same.align(logits, 0, 1, TEMPERATURE)
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    # Whatever constant a window adds to all of its logits is of no account.
    shifted = logits + np.repeat([5.0, -3.0, 100.0], 10)[:, None]
    np.testing.assert_allclose(same.align(shifted, 0, 1, TEMPERATURE), wanted, atol=1e-12)


def test_equal_tokens_stay_where_they_are():
    made = aligner(
        WORDWISE,
        by_pattern("x", "who", "?", "Rollo", "ruled", "New", "York", "."),
        [("who ?", "Rollo ruled New York ."), ("who", "New York")],
    )
    logits = np.random.default_rng(0).normal(0, 3, (len(made.student.input_ids), 2))
    found = made.align(logits, 0, 2, TEMPERATURE)
    np.testing.assert_allclose(
        found, softened(logits, made.student.window_start, TEMPERATURE), atol=1e-15
    )


ODD = [
    *WORDS,
    "e\u0301\u0301",
    "ﬁne",
    "①",
    "\u200b",
    "a\u200bb",
    "\u00a0",
    " ",
    "  ",
    "\n",
    "…",
    "Straße",
    "İ",
    "한국어",
    "क्षि",
    "𝔸",
    "..",
    "\u0301",
]
# Pairs of families, either way round and each at least once on each side.
PAIRS = [
    ("bert", "roberta"),
    ("roberta", "xlm_roberta"),
    ("xlm_roberta", "deberta"),
    ("deberta", "deberta_v2"),
    ("deberta_v2", "modernbert"),
    ("modernbert", "bert"),
    ("roberta", "deberta_v2"),
]


@pytest.mark.parametrize("student, teacher", PAIRS)
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(data=st.data())
def test_any_text_is_aligned_as_a_plain_loop_aligns_it(student, teacher, data):
    text = st.lists(st.sampled_from(ODD), min_size=1, max_size=30)
    asked = data.draw(
        st.lists(st.tuples(text.map(" ".join), st.tuples(text, text)), min_size=1, max_size=3)
    )
    pairs = [(question, "".join(one) + "x" + " ".join(other)) for question, (one, other) in asked]
    made = aligner(
        of_family(student),
        of_family(teacher),
        pairs,
        max_seq_length=40,
        max_query_length=data.draw(st.integers(1, 20)),
        doc_stride=data.draw(st.integers(1, 14)),
        teacher_length=data.draw(st.integers(12, 120)),
        teacher_stride=data.draw(st.integers(1, 60)),
    )
    logits = np.random.default_rng(len(pairs)).normal(
        0, 3, (len(made.teacher.windows.input_ids), 2)
    )
    found = made.align(logits.astype(np.float16), 0, len(made.student), TEMPERATURE)
    starts = made.student.window_start
    np.testing.assert_allclose(np.add.reduceat(found, starts[:-1]), 1, rtol=0, atol=1e-6)
    for window in range(len(made.student)):
        wanted = by_the_book(made, logits.astype(np.float16), window, TEMPERATURE)
        np.testing.assert_allclose(
            found[starts[window] : starts[window + 1]], wanted, rtol=0, atol=1e-9
        )


def test_families_of_the_property_are_all_of_them():
    assert {a for a, _ in PAIRS} == {b for _, b in PAIRS} == set(FAMILIES)
