"""Files with faults through the programs: what is left out is counted, said, and in run.json."""

import json

import pytest

from kdfast import evaluate, predict
from kdfast.demo import TEACHER
from tests import corpora
from tests.programs import World


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def spoiled(path):
    """20 articles, 40 questions, of which five cannot be trained on, two of one id."""
    data = json.loads(path.read_text())
    paragraphs = [article["paragraphs"][0] for article in data["data"]]
    paragraphs[0]["context"] = None
    paragraphs[1]["qas"][0]["answers"] = [{"text": "Nobody", "answer_start": 0}]
    paragraphs[2]["qas"][0]["answers"] = [{"text": "e", "answer_start": -1}]
    (answer,) = paragraphs[3]["qas"][0]["answers"]
    answer["answer_start"] += 1
    paragraphs[4]["qas"][0]["is_impossible"] = True
    paragraphs[5]["qas"][0]["id"] = "q4"
    whole = paragraphs[14]["context"]
    paragraphs[14]["qas"][0]["answers"] = [{"text": whole, "answer_start": 0}]
    path.write_text(json.dumps(data))
    return whole


NOTES = (
    "2 of 40 questions have no context: left out (q0, n0).",
    "1 of 40 questions have an id that an earlier one has: it gets #2, #3 and so on (q4).",
    "1 of 40 questions have an answer that is not in their context: left out of training (q1).",
    "1 of 40 questions have an answer that is several times in their context",
    "1 of 40 questions have an answer that no window holds whole, as --max_seq_length is 60 and "
    "--doc_stride 40: left out of training (q14).",
    "1 of 40 questions have their answer elsewhere than stated",
    "1 of 40 questions are marked is_impossible and have answers",
)


def test_what_is_left_out_is_counted_printed_and_printed_again_from_the_cache(world, capsys):
    train_file = world.path / "train.json"
    spoiled(train_file)
    flags = {"max_seq_length": 60, "max_query_length": 10, "doc_stride": 40, "max_steps": 1}
    for output in ("first", "second"):
        assert world.run(output_dir=world.path / output, validation_file=None, **flags) == 0
        said = capsys.readouterr().out
        for note in NOTES:
            assert note in said
        record = json.loads((world.path / output / "run.json").read_text())
        reasons = {"no_context": 2, "absent": 1, "ambiguous": 1, "longer_than_window": 1}
        assert record["questions"] == {"read": 40, "trained": 35, "left_out": reasons}


def test_unlabelled_questions_without_a_teacher_are_counted(world):
    rows = [json.loads((world.path / "train.json").read_text())]
    del rows[0]["data"][0]["paragraphs"][0]["qas"][0]["answers"]
    del rows[0]["data"][0]["paragraphs"][0]["qas"][0]["is_impossible"]
    (world.path / "train.json").write_text(json.dumps(rows[0]))
    alone = {"teacher": None, "distillation_loss_weight": 0, "max_steps": 1}
    assert world.run(**alone, validation_file=None) == 0
    record = json.loads((world.output / "run.json").read_text())
    assert record["questions"] == {"read": 40, "trained": 39, "left_out": {"unlabelled": 1}}


def test_nothing_to_train_on(world, capsys):
    data = [{"id": "a", "question": "Who?", "context": "Rollo", "answers": ["Otto"]}]
    (world.path / "train.json").write_text(json.dumps(data))
    assert world.run(validation_file=None) == 2
    captured = capsys.readouterr()
    assert "not in their context: left out of training (a)" in captured.out
    assert "no question to train on: all are left out" in captured.err


def test_what_predict_writes_is_what_evaluate_reads(tmp_path, capsys):
    """Also where two questions have one id; all of them are scored."""
    path = tmp_path / "dev.json"
    corpora.write(path, 4)
    data = json.loads(path.read_text())
    data["data"][1]["paragraphs"][0]["qas"][0]["id"] = "q0"
    path.write_text(json.dumps(data))
    answers = tmp_path / "answers.jsonl"
    assert (
        predict.main(["--model", str(TEACHER), "--data", str(path), "--output", str(answers)]) == 0
    )
    lines = list(map(json.loads, answers.read_text().splitlines()))
    assert [line["id"] for line in lines[:4]] == ["q0", "n0", "q0#2", "n1"]
    capsys.readouterr()
    named = {line["id"]: line["answer"] for line in lines}
    shared = {key: answer for key, answer in named.items() if key != "q0#2"}
    for content in (named, shared):
        (tmp_path / "p.json").write_text(json.dumps(content))
        for each in (answers, tmp_path / "p.json"):
            assert evaluate.main(["--data", str(path), "--predictions", str(each)]) == 0
            captured = capsys.readouterr()
            assert json.loads(captured.out)["total"] == 8
            assert "1 of 8 questions have an id that an earlier one has" in captured.err
            assert "without a prediction" not in captured.err


def test_an_evaluation_without_ids_is_refused(tmp_path, capsys):
    rows = [{"question": "Who?", "context": "Rollo", "answers": ["Rollo"]}]
    (tmp_path / "dev.json").write_text(json.dumps(rows))
    (tmp_path / "p.json").write_text("{}")
    flags = ["--data", str(tmp_path / "dev.json"), "--predictions", str(tmp_path / "p.json")]
    assert evaluate.main(flags) == 2
    assert "give each question an id" in capsys.readouterr().err
