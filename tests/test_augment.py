"""The program that copies data with words replaced: what comes out, kills, parts, mistakes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from kdfast import augment
from kdfast.data.examples import Place, locate
from kdfast.data.held_out import article_of
from kdfast.data.read import read_examples
from kdfast.synthetic import copies
from tests import corpora, readers


@pytest.fixture
def augmented(tmp_path, capsys):
    """Runs the program on a small corpus, and keeps what it said."""
    data = corpora.write(tmp_path / "data.json", 12)
    model = readers.save(tmp_path / "model")

    class Augmented:
        def __init__(self):
            self.flags = {"data": data, "embeddings": model, "copies": 3, "probability": 0.5}
            self.path = tmp_path

        def command(self, **changes):
            flags = self.flags | {"output": tmp_path / "copies.jsonl"} | changes
            return [
                str(part)
                for name, value in flags.items()
                if value is not None
                for part in ([f"--{name}"] if value is True else [f"--{name}", value])
            ]

        def run(self, **changes):
            status = augment.main(self.command(**changes))
            self.said = capsys.readouterr()
            return status

    return Augmented()


def test_copies_are_read_with_answers_that_stand_where_they_say(augmented):
    assert augmented.run() == 0, augmented.said.err
    before = {each.id: each for each in read_examples(augmented.flags["data"])}
    after = read_examples(str(augmented.path / "copies.jsonl"))
    assert len(after) == 3 * len(before)
    kept = lost = 0
    for each in after:
        old = before[each.id.rpartition("-copy-")[0]]
        assert each.question == old.question and each.title == old.title
        assert each.context.split(" ")[-1] and len(each.context.split()) == len(old.context.split())
        if not old.answers:
            assert each.answers == ()
        elif each.answers is None:
            lost += 1
        else:
            kept += 1
            (answer,) = each.answers
            assert answer.text == old.answers[0].text
            assert locate(each.context, answer) == Place(
                answer.start, answer.start + len(answer.text), moved=False
            )
    assert "36 copies of 12 contexts were made. Of their words " in augmented.said.out
    assert f"Of 72 questions {lost} lost their answers" in augmented.said.out
    assert kept + lost == 36
    assert len({each.context for each in after}) == 36


def test_without_answers_and_with_questions(augmented):
    assert augmented.run(answers="drop", augment_questions=True, copies=2) == 0
    before = {each.id: each for each in read_examples(augmented.flags["data"])}
    after = read_examples(str(augmented.path / "copies.jsonl"))
    assert {each.answers for each in after} == {None}
    changed = [each for each in after if each.question != before[each.id[:-7]].question]
    assert len(changed) > len(after) / 2


def test_parts_are_those_of_the_whole(augmented, monkeypatch):
    monkeypatch.setattr(copies, "TOGETHER", 4)
    assert augmented.run(output=augmented.path / "whole.jsonl") == 0
    lines = []
    for part in range(2):
        path = augmented.path / f"{part}.jsonl"
        assert augmented.run(output=path, shard=f"{part}/2") == 0
        lines += [json.loads(line) for line in path.read_text().splitlines()]
    whole = [json.loads(line) for line in (augmented.path / "whole.jsonl").read_text().splitlines()]
    for each in (*lines, *whole):
        del each["made_by"]["key"]
    assert sorted(lines, key=lambda line: line["made_by"]["part"]) == whole
    assert [line["made_by"]["part"] for line in whole] == [0] * 12 + [1] * 12 + [2] * 12


@pytest.mark.parametrize("left", [0.3, 0.7, 0.99])
def test_what_a_kill_left_is_gone_on_with(augmented, monkeypatch, left):
    monkeypatch.setattr(copies, "TOGETHER", 2)
    assert augmented.run() == 0
    output = augmented.path / "copies.jsonl"
    whole = output.read_bytes()
    output.unlink()
    part = augmented.path / "copies.jsonl.part"
    part.write_bytes(whole[: int(left * len(whole))])
    made = []
    real = copies.Copier.copies
    monkeypatch.setattr(
        copies.Copier, "copies", lambda self, part: made.append(1) or real(self, part)
    )
    assert augmented.run() == 0 and "going on at paragraph" in augmented.said.out
    assert output.read_bytes() == whole and not part.exists()
    assert 0 < len(made) < 6

    output.rename(part)
    assert augmented.run(seed=7) == 2
    assert "copies.jsonl.part was begun with other settings" in augmented.said.err
    assert part.read_bytes() == whole


def test_a_killed_program_leaves_nothing_that_looks_whole(augmented):
    corpora.write(augmented.path / "data.json", 400)
    command = [sys.executable, "-m", "kdfast.augment", *augmented.command(copies=40)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    part, output = (augmented.path / name for name in ("copies.jsonl.part", "copies.jsonl"))
    while not part.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not output.exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert len(output.read_bytes().splitlines()) == 16_000


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"data": None}, "--data is missing"),
        ({"embeddings": None}, "Nothing proposes words"),
        ({"probability": "1.5"}, "--probability"),
        ({"copies": "0"}, "--copies"),
        ({"shard": "3/2"}, "--shard is 3/2"),
        ({"vectors": "nowhere.txt"}, "nowhere.txt"),
        ({"masked_model": "nowhere/at-all"}, "--masked_model nowhere/at-all"),
        ({"data": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_mistakes_are_sentences(augmented, changes, said):
    assert augmented.run(**changes) == 2
    assert said in augmented.said.err and augmented.said.err.count("\n") == 1
    assert not list(augmented.path.glob("copies*"))


def test_nothing_is_written_over_or_through(augmented):
    output = augmented.path / "copies.jsonl"
    output.write_text("mine")
    assert augmented.run() == 2 and "is there: delete it" in augmented.said.err
    assert output.read_text() == "mine"
    output.unlink()
    (augmented.path / "copies.jsonl.part").symlink_to(augmented.path / "elsewhere")
    assert augmented.run() == 2 and "is a link" in augmented.said.err
    assert not (augmented.path / "elsewhere").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        augment.main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    for name in ("--masked_model", "--vectors", "--embeddings", "--answers {keep,drop}"):
        assert name in said


def test_students_train_on_copies(augmented, world):
    assert augmented.run(answers="drop") == 0
    assert world.run(train_file=augmented.path / "copies.jsonl", max_steps=2) == 0
    counts = json.loads((world.output / "run.json").read_text())["questions"]
    assert counts["trained"] == 72 and counts["left_out"] == {}


def test_a_foreign_file_is_left_alone(augmented):
    part = augmented.path / "copies.jsonl.part"
    part.write_text("a download\nof something else\n")
    assert augmented.run() == 2 and "is damaged, or not of kdfast.augment" in augmented.said.err
    assert part.read_text() == "a download\nof something else\n"


def test_a_pipe_is_refused(augmented):
    os.mkfifo(augmented.path / "pipe")
    assert augmented.run(data=augmented.path / "pipe") == 2
    assert "is a pipe, and is read twice" in augmented.said.err


def test_copies_of_data_without_titles_are_held_out_with_their_originals(augmented):
    path = augmented.path / "records.jsonl"
    record = {"id": "1", "question": "Who?", "context": "The man saw the city.", "answers": []}
    path.write_text(json.dumps(record) + "\n")
    assert augmented.run(data=path) == 0
    (original,) = read_examples(str(path))
    made = read_examples(str(augmented.path / "copies.jsonl"))
    assert {article_of(each) for each in made} == {article_of(original)}
