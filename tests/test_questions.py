"""kdfast.questions: from contexts to questions, with a stand-in endpoint and with tiny models."""

import json
import os

import pytest

from kdfast import evaluate, questions
from kdfast.data.read import read_examples
from kdfast.demo import TEACHER
from tests.synthetic import endpoint

pytestmark = pytest.mark.program
pytest.importorskip("openai")


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """run(**flags) calls the program with an endpoint, `stand_in`."""
    monkeypatch.setenv("OPENAI_API_KEY", endpoint.KEY)
    with endpoint.serve() as (url, stand_in):
        data = endpoint.write_contexts(tmp_path / "contexts.jsonl")

        def run(**flags):
            given = {
                "data": data,
                "output": tmp_path / "made.json",
                "teacher": TEACHER,
                "endpoint_model": "m",
                "base_url": url,
                "max_retries": 0,
                "unanswerable": 1,
                "batch_size": 1,
                **flags,
            }
            return questions.main([f"--{name}={value}" for name, value in given.items()])

        run.stand_in, run.folder = stand_in, tmp_path
        yield run


def made_of(path):
    content = json.loads(path.read_text())
    paragraphs = [each for article in content["data"] for each in article["paragraphs"]]
    return [(each["context"], qa) for each in paragraphs for qa in each["qas"]]


def test_a_good_endpoint(asked, capsys):
    assert asked() == 0
    output = asked.folder / "made.json"
    made = made_of(output)
    examples = {each.id: each for each in read_examples(str(output))}
    assert len(examples) == len(made) > 60
    known = {q.text: q.answer for p in endpoint.PASSAGES for q in p.questions}
    right = 0
    for context, qa in made:
        origin = qa["synthetic"]
        assert origin["generator"] == "m" and origin["revision"] == "m-1"
        assert origin["teacher"] == str(TEACHER) and origin["seed"] == 42
        if qa["is_impossible"]:
            assert not qa["answers"] and origin["kept_by"] == "no_answer"
            assert origin["margin"] <= -4 and examples[origin["asked_of"]].context != context
            continue
        (answer,) = qa["answers"]
        assert context.startswith(answer["text"], answer["answer_start"])
        assert origin["f1"] >= 0.8 if origin["kept_by"] == "agreement" else origin["margin"] >= 4
        right += answer["text"] == known[qa["question"]]
    answerable = [qa for _, qa in made if not qa["is_impossible"]]
    assert right > 0.9 * len(answerable) and len(answerable) < len(made)
    said = capsys.readouterr()
    assert f"12 contexts: {len(answerable)} questions are kept" in said.out
    # The key was sent, and stands nowhere.
    assert asked.stand_in.keys == {f"Bearer {endpoint.KEY}"}
    texts = [path.read_text() for path in asked.folder.iterdir()]
    assert not any(endpoint.KEY in text for text in [*texts, said.out, said.err])


def test_the_margins_are_those_of_kdfast_evaluate(asked):
    """And so are the answers: the teacher scores 100 on what it has kept."""
    assert asked() == 0
    output, folder = asked.folder / "made.json", asked.folder / "evaluated"
    flags = ["--data", str(output), "--model", str(TEACHER), "--output_dir", str(folder)]
    assert evaluate.main([*flags, "--cache_dir", str(asked.folder / "cache")]) == 0
    assert json.loads((folder / "metrics.json").read_text())["exact"] == 100
    odds = json.loads((folder / "null_odds.json").read_text())
    for _, qa in made_of(output):
        assert qa["synthetic"]["margin"] == pytest.approx(-odds[qa["id"]], abs=1e-3)


def test_a_stopped_run_goes_on(asked, capsys):
    assert asked(output=asked.folder / "whole.json") == 0
    asked.stand_in.asked.clear()
    good = asked.stand_in.answer

    def failing(passage, number):
        return (500, {"error": {"message": "down"}}) if number == 5 else good(passage, number)

    asked.stand_in.answer = failing
    # The other replies of the batch are kept.
    assert asked(batch_size=4) == 2
    assert "down" in capsys.readouterr().err and len(asked.stand_in.asked) == 8
    candidates = asked.folder / "made.json.candidates.jsonl"
    assert len(candidates.read_text().splitlines()) == 1 + 7
    candidates.write_bytes(candidates.read_bytes()[:-30])  # as a kill leaves it
    asked.stand_in.asked.clear()
    asked.stand_in.answer = good
    assert asked(batch_size=3) == 0
    assert len(asked.stand_in.asked) == 12 - 6
    whole = asked.folder / "whole.json"
    assert (asked.folder / "made.json").read_bytes() == whole.read_bytes()


def test_other_thresholds_need_no_new_questions(asked):
    assert asked() == 0
    before = made_of(asked.folder / "made.json")
    asked.stand_in.asked.clear()
    assert asked(min_f1=1, min_margin=20, min_null_margin=20) == 0
    assert not asked.stand_in.asked
    after = made_of(asked.folder / "made.json")
    assert 0 < len(after) < len(before)


def test_other_settings_do_not_mix(asked, capsys):
    assert asked() == 0
    before = (asked.folder / "made.json").read_bytes()
    assert asked(seed=1) == 2
    assert "begun with other settings" in capsys.readouterr().err
    (asked.folder / "made.json.candidates.jsonl").unlink()
    assert asked() == 2
    assert "is there, and made.json.candidates.jsonl" in capsys.readouterr().err
    assert (asked.folder / "made.json").read_bytes() == before


def test_second_span_of_a_teacher_without_null(asked):
    assert asked(margin_over="second_span") == 0
    made = made_of(asked.folder / "made.json")
    assert made and not any(qa["is_impossible"] for _, qa in made)
    assert all(qa["synthetic"]["margin"] > 0 for _, qa in made)


FAULTS = [
    ((401, {"error": {"message": f"wrong key {endpoint.KEY}"}}), "AuthenticationError"),
    ((429, {"error": {"message": "slowly"}}), "RateLimitError"),
    ((500, b"<html>"), "InternalServerError"),
    ((400, {"error": {"message": "no temperature"}}), "no temperature"),
    (b"{", "no chat completion"),
    ({}, "no chat completion"),
    ({"choices": []}, "no chat completion"),
]


@pytest.mark.parametrize("fault, words", FAULTS, ids=[words for _, words in FAULTS])
def test_faults_of_an_endpoint_are_one_sentence(asked, capsys, fault, words):
    asked.stand_in.answer = lambda passage, number: fault
    assert asked() == 2
    said = capsys.readouterr()
    assert words in said.err and "Traceback" not in said.err and endpoint.KEY not in said.err
    assert not (asked.folder / "made.json").exists()


def test_nobody_listens(asked, capsys):
    assert asked(base_url="http://127.0.0.1:9/v1") == 2
    assert "APIConnectionError" in capsys.readouterr().err


def test_the_client_tries_again(asked):
    good = asked.stand_in.answer
    asked.stand_in.answer = lambda passage, number: (
        (429, {"error": {"message": "slowly"}}) if number == 0 else good(passage, number)
    )
    assert asked(max_retries=1) == 0
    assert len(asked.stand_in.asked) == 13


ASKED = {"question": "Who?", "answer": "nobody"}
ODD = {
    0: endpoint.completion("", refusal="I cannot"),
    1: endpoint.completion(None, "content_filter"),
    2: endpoint.completion(""),
    3: endpoint.completion("Sure! Here you are."),
    4: endpoint.completion('{"question": "Who is', "length"),
    5: endpoint.completion("x" * (1 << 21)),
    6: endpoint.completion("[" * 100_000),
    7: endpoint.completion(json.dumps(ASKED | {"question": "\x1b[2JWho?"})),
    8: endpoint.completion(json.dumps(ASKED | {"question": "word " * 300})),
    9: (400, {"error": {"message": "too long"}}),
    10: endpoint.completion("\n".join([json.dumps(ASKED)] * 2)),
}
ODD_SAID = (
    "dropped 3: a reply is refused by the endpoint",
    "dropped 1: a reply is empty",
    "dropped 3: a reply holds no question in JSON",
    "dropped 1: a reply is cut by --max_new_tokens",
    "dropped 1: a reply is longer than a megabyte",
    "dropped 1: the question or its answer holds control characters",
    "dropped 1: the question has more tokens than the teacher's windows keep",
    "dropped 1: the question is asked of this context already",
    "1: its own answer is not in the passage, so the margin decides",
)


def test_odd_replies_are_counted(asked, capsys):
    good = asked.stand_in.answer
    asked.stand_in.answer = lambda passage, number: ODD.get(number) or good(passage, number)
    assert asked() == 0
    said = capsys.readouterr().out
    assert [each for each in ODD_SAID if each not in said] == []
    # Each of these has had its reply, and is not asked again.
    asked.stand_in.asked.clear()
    assert asked() == 0 and not asked.stand_in.asked


def test_nothing_kept_is_said(asked, capsys):
    asked.stand_in.answer = lambda passage, number: endpoint.completion("no")
    assert asked() == 2
    assert "No question was kept" in capsys.readouterr().err
    assert not (asked.folder / "made.json").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"data": ""}, "--data is missing"),
        ({"generator": "m"}, "not both"),
        ({"request": "[]"}, "--request is no JSON object"),
        ({"request": '{"messages": []}'}, "--request is no JSON object"),
        ({"min_margin": "nan"}, "--min_margin is nan"),
        ({"base_url": "localhost"}, "no address"),
        ({"base_url": "http://me:secret@localhost/v1"}, "the result would show"),
        ({"prompt_file": "none.txt"}, "cannot be read"),
        ({"output": "/dev/null"}, "a pipe or a device"),
    ],
)
def test_mistakes_are_one_sentence(asked, capsys, flags, words):
    assert asked(**flags) == 2
    error = capsys.readouterr().err
    assert words in error and "secret" not in error and not asked.stand_in.asked


def test_links_are_refused(asked, capsys):
    (asked.folder / "other.json").write_text("mine")
    for name in ("made.json", "made.json.candidates.jsonl"):
        (asked.folder / name).symlink_to("other.json")
        assert asked() == 2 and "is a link" in capsys.readouterr().err
        (asked.folder / name).unlink()
    assert (asked.folder / "other.json").read_text() == "mine"


def test_without_a_key(asked, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert asked() == 2 and "OPENAI_API_KEY is not set" in capsys.readouterr().err
    assert os.listdir(asked.folder) and not asked.stand_in.asked


@pytest.mark.parametrize("line", ["{", "[]", '{"paragraph": 99}', '{"paragraph": 0, "by": 1}'])
def test_a_damaged_candidate_file(asked, capsys, line):
    asked.stand_in.answer = lambda passage, number: (500, {})
    assert asked() == 2
    candidates = asked.folder / "made.json.candidates.jsonl"
    candidates.write_text(candidates.read_text() + line + "\n")
    capsys.readouterr()
    assert asked() == 2 and "damaged in line 2" in capsys.readouterr().err
