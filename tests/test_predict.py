import json
import os
import threading

import pytest

from kdfast import predict
from kdfast.demo import TEACHER
from kdfast.reader import Reader
from tests import corpora, readers

CONTEXT = "The school in Dornow was founded in 1902. Its head is Anna Weber, and its motto is old."
QUESTION = "Who is the head of the school?"


@pytest.fixture(scope="module")
def ask():
    return Reader(TEACHER)


@pytest.fixture
def run(capsys):
    """A function that runs the program; gives its status, the lines it wrote, and its errors."""

    def call(*flags, model=str(TEACHER)):
        status = predict.main(["--model", model, *flags])
        captured = capsys.readouterr()
        return status, [json.loads(line) for line in captured.out.splitlines()], captured.err

    return call


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_one_question(run, ask):
    status, lines, _ = run("--question", QUESTION, "--context", CONTEXT)
    assert status == 0
    assert lines == [{"id": 0, "question": QUESTION, **ask(QUESTION, CONTEXT)}]


def test_context_file_to_the_character(run, ask, tmp_path):
    context = "First line 🚀.\r\n" + CONTEXT
    (tmp_path / "c.txt").write_bytes(context.encode("utf-8-sig"))
    flags = ["--handle_impossible_answer", "--no_align_to_words", "--max_answer_len", "2"]
    status, lines, _ = run(
        "--question", QUESTION, "--context_file", str(tmp_path / "c.txt"), "--top_k", "3", *flags
    )
    expected = ask(
        QUESTION,
        context,
        top_k=3,
        handle_impossible_answer=True,
        align_to_words=False,
        max_answer_len=2,
    )
    assert status == 0
    assert lines == [{"id": 0, "question": QUESTION, "answers": expected}]


def test_jsonl_to_a_file(run, ask, tmp_path):
    data = write(
        tmp_path / "in.jsonl",
        {"question": QUESTION, "context": CONTEXT},
        {"id": "b", "question": "Wo? 🚀", "context": CONTEXT, "answers": "not looked at"},
        {"id": None, "question": QUESTION, "context": "Anna Weber"},
    )
    output = tmp_path / "new" / "out.jsonl"
    status, lines, err = run("--data", data, "--output", str(output))
    assert status == 0 and lines == [] and err == ""
    found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in found] == [0, "b", 2]
    assert found[0] == {"id": 0, "question": QUESTION, **ask(QUESTION, CONTEXT)}
    assert [path.name for path in output.parent.iterdir()] == ["out.jsonl"]


def test_squad_file(run, ask, tmp_path):
    data = corpora.write(tmp_path / "dev.json", 4)
    status, lines, err = run("--data", data, "--max_seq_len", "40", "--doc_stride", "5")
    assert status == 0 and err == ""
    assert [line["id"] for line in lines] == [f"{kind}{n}" for n in range(4) for kind in "qn"]
    paragraph = corpora.article(3)["paragraphs"][0]
    question, context = paragraph["qas"][0]["question"], paragraph["context"]
    expected = ask(question, context, max_seq_len=40, doc_stride=5)
    assert lines[6]["answer"] == context[lines[6]["start"] : lines[6]["end"]] == expected["answer"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "either --question or --data"),
        (["--question", "q", "--data", "d"], "either --question or --data"),
        (["--question", "q"], "either --context or --context_file"),
        (["--question", "q", "--context", "c", "--context_file", "f"], "either --context"),
        (["--data", "d", "--context", "c"], "--context goes with --question"),
        (["--question", "", "--context", "c"], "--question is empty"),
        (["--question", "q", "--context", ""], "--context is empty"),
        (["--question", "q", "--context", "c", "--top_k", "0"], "top_k is 0"),
        (["--question", "q", "--context_file", "/no/such"], "/no/such cannot be read"),
        (["--data", "/no/such"], "'/no/such': no such file"),
        (["--question", "q", "--context", "c", "--output", "/proc/kdfast/o"], "--output"),
        (["--question", "q", "--context", "c", "--output", "/"], "--output / cannot be written"),
    ],
)
def test_flags_that_cannot_be(run, flags, words):
    status, lines, err = run(*flags)
    assert status == 2 and lines == []
    assert err.startswith("error: ") and words in err and len(err.splitlines()) == 1


GOOD = {"question": QUESTION, "context": CONTEXT}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"question": "q"}, "have no context: left out (line 1)"),
        (["q", "c"], "cannot be read: left out (line 1[0], line 1[1])"),
        ({"question": "", "context": "c"}, "have no question: left out (0)"),
        ({"question": None, "context": "c", "id": "a"}, "have no question: left out (a)"),
        ({"question": "q", "context": ""}, "have no context: left out (line 1)"),
        ({"question": "q", "context": "half \ud83d"}, "have no context: left out (line 1)"),
        (
            {"paragraphs": [{"context": "c", "qas": [{"id": "a"}]}]},
            "have no question: left out (a)",
        ),
    ],
)
def test_a_record_that_cannot_be_asked_is_left_out_and_said(run, tmp_path, bad, words):
    status, lines, err = run("--data", write(tmp_path / "in.jsonl", bad, GOOD | {"id": 5}))
    assert status == 0 and [line["id"] for line in lines] == ["5"]
    assert words in err and f"{'2 of 3' if isinstance(bad, list) else '1 of 2'} questions" in err


def test_a_fault_in_the_file_is_found_before_the_first_answer(run, tmp_path):
    data = tmp_path / "in.jsonl"
    data.write_text(json.dumps(GOOD) + "\n{")
    status, lines, err = run("--data", str(data), "--output", str(tmp_path / "out"))
    assert status == 2 and lines == [] and "in line 2" in err and len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_pipe_is_read_once(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    content = json.dumps(GOOD).encode()
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
    writer.start()
    status, lines, _ = run("--data", str(tmp_path / "pipe"))
    writer.join()
    assert status == 0 and [line["id"] for line in lines] == [0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"{", "not JSON"),
        (b"[]", "no question in it"),
        (b"\xff", "not UTF-8"),
        (b'{"question": "", "context": "c"}', "questions without a text"),
    ],
)
def test_files_that_are_none(run, tmp_path, content, words):
    (tmp_path / "in.json").write_bytes(content)
    status, _, err = run("--data", str(tmp_path / "in.json"))
    assert status == 2 and words in err.splitlines()[-1]


def test_a_failed_run_leaves_the_earlier_output(run, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("earlier\n")
    flags = ["--question", QUESTION, "--context", CONTEXT * 9, "--doc_stride", "150"]
    status, _, err = run(*flags, "--output", str(output))
    assert status == 2 and "smaller doc_stride" in err
    assert output.read_text() == "earlier\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]  # no line was lost


def test_a_model_without_a_head(run, tmp_path):
    asked = ["--question", QUESTION, "--context", CONTEXT]
    status, _, err = run(*asked, model=readers.save(tmp_path, head=False))
    assert status == 2 and "no question-answering head" in err
    assert predict.main(asked) == 2
