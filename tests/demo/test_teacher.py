"""The embedded teacher's folder, and the start from which it was trained."""

import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from kdfast.demo import TEACHER, WINDOW
from kdfast.demo.passages import passages
from tests.demo.start import start_model
from tests.demo.vocabulary import make_tokenizer


def test_the_teacher_is_small_and_loads_in_its_own_precision():
    assert sum(path.stat().st_size for path in TEACHER.iterdir()) < 4_000_000
    model = AutoModelForQuestionAnswering.from_pretrained(TEACHER)
    assert model.dtype == torch.float16
    assert model.config.max_position_embeddings >= WINDOW["max_seq_length"]


def test_the_teachers_tokenizer_is_the_one_made_from_the_templates():
    saved = AutoTokenizer.from_pretrained(TEACHER)
    made = make_tokenizer(WINDOW["max_seq_length"])
    assert saved.is_fast
    assert saved.get_vocab() == made.get_vocab()
    pair = ("When was Oakham Castle built?", "Oakham Castle has stood since 1843.")
    assert saved(*pair)["input_ids"] == made(*pair)["input_ids"]
    assert 1 in saved(*pair)["token_type_ids"]


def test_every_question_and_its_whole_passage_fit_in_one_window():
    tokenizer = make_tokenizer(WINDOW["max_seq_length"])
    for side in ("train", "validation"):
        found, _ = passages(side, 500, seed=4)
        for passage in found:
            for question in passage.questions:
                asked = len(tokenizer.tokenize(question.text))
                assert asked <= WINDOW["max_query_length"]
                told = len(tokenizer.tokenize(passage.text))
                assert WINDOW["max_query_length"] + told + 3 <= WINDOW["max_seq_length"]


def test_the_start_depends_on_its_seed_alone():
    torch.manual_seed(0)
    one = start_model(100, 160, 1).state_dict()
    torch.manual_seed(1)
    same = start_model(100, 160, 1).state_dict()
    other = start_model(100, 160, 2).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    name = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(one[name], other[name])


def test_a_head_of_the_start_finds_a_word_of_the_passage_in_the_question():
    """Without any training: where most of its attention goes, seen from the passage's words."""
    model = start_model(200, 160, 1)
    model.config._attn_implementation = "eager"
    draw = torch.Generator().manual_seed(3)
    words = torch.randperm(195, generator=draw)[:40] + 5
    question, passage = words[:10], words[10:].clone()
    passage[[4, 11, 20]] = question[[2, 5, 8]]
    ids = torch.cat([question, passage])[None]
    segments = torch.tensor([[0] * 10 + [1] * 30])
    with torch.no_grad():
        found = model(ids, token_type_ids=segments, output_attentions=True).attentions[0]
    assert found[0, 0, [14, 21, 30]].argmax(-1).tolist() == [2, 5, 8]
    assert found[0, 1, 1:].argmax(-1).tolist() == list(range(39))  # one step back
