"""What programs print of hostile data, names and files: no byte of it steers the terminal."""

import json
import re
from pathlib import Path

import pytest

from kdfast import card, doctor, evaluate, predict, prepare
from tests.programs import edit
from tests.test_terminal import Terminal, command

# Clears, goes back, rings, colours by a C1 control, turns text around, hides, ends lines.
EVIL = "a\x1b[2J\rb\x07\x9b31m\u202e\u2066\u200b\u2028\u0085c\x7f\nerror d"
NAME = "m\x1b]0;t\x07\x9b\u202e\nerror x"  # of a folder


@pytest.fixture
def evil(world):
    """A world whose texts, ids, titles and folders are hostile."""
    for name in ("teacher", "student"):
        Path(getattr(world, name)).rename(world.path / f"{name}{NAME}")
        setattr(world, name, str(world.path / f"{name}{NAME}"))
    world.output = world.path / f"out{NAME}"
    for name in ("train_file", "validation_file"):
        data = json.loads(Path(getattr(world, name)).read_text())
        for number, article in enumerate(data["data"]):
            article["title"] = EVIL
            paragraph = article["paragraphs"][0]
            paragraph["context"] = text = paragraph["context"].replace("In the", f"{EVIL} the")
            for asked in paragraph["qas"]:
                asked["id"] = f"{EVIL}{number % 3}"  # so that notes name them
                asked["question"] += EVIL
                for answer in asked["answers"]:
                    answer["answer_start"] = text.index(answer["text"]) + number % 2
        path = world.path / f"{name}{NAME}.json"
        path.write_text(json.dumps(data))
        setattr(world, name, str(path))
    return world


def printed(capfd, least=1):
    """Standard output and standard error since the last call; at least `least` escapes in them."""
    parts = capfd.readouterr()
    for text in parts:
        strange = [each for each in text if not each.isprintable() and each != "\n"]
        assert not strange, (strange, text)
        assert not re.search(r"^error [dx]", text, re.MULTILINE), text
        assert "Traceback" not in text
    assert sum(text.count("\\u") for text in parts) >= least, parts
    return parts


def test_no_program_prints_what_steers_a_terminal(evil, capfd, monkeypatch):
    cache = ["--cache_dir", str(evil.path / f"cache{NAME}"), "--max_seq_length", "200"]
    files = ["--student", evil.student, "--train_file", evil.train_file]
    assert prepare.main([*files, "--teacher", evil.teacher, *cache]) == 0
    printed(capfd)
    made = {"eval_steps": 2, "max_steps": 3, "report": True}
    assert evil.run(cache_dir=cache[1], **made) == 0
    printed(capfd, least=10)
    model = ["--model", str(evil.output), "--data", evil.validation_file]
    folder = evil.path / f"eval{NAME}"
    program = [*model, "--compare", evil.teacher, "--output_dir", str(folder), *cache]
    assert evaluate.main(program) == 0
    table = printed(capfd)[1]
    assert table.count("\n|") >= 4
    (answers := evil.path / "answers.json").write_text(json.dumps({EVIL: EVIL, f"{EVIL}0": EVIL}))
    asked = ["--predictions", str(answers), "--data", evil.validation_file]
    assert evaluate.main(asked) == 0
    assert "unknown questions" in printed(capfd)[1]
    assert predict.main(model) == 0
    lines = printed(capfd, least=30)[0].splitlines()
    assert all(json.loads(line)["question"].endswith(EVIL) for line in lines)
    edit(evil.output, "card.json", beside=[str(evil.path / f"gone{NAME}")])
    assert card.main(["--model_dir", str(evil.output)]) == 0
    assert "is left out" in printed(capfd)[0]
    monkeypatch.setenv("CXX", f"g++{EVIL}".replace("\0", ""))
    assert doctor.main([]) == 0
    printed(capfd, least=0)
    assert doctor.main(["--convert", evil.teacher]) == 2
    printed(capfd)


def test_nor_do_the_bars(evil):
    terminal = Terminal(command("train", *evil.flags(eval_steps=2, max_steps=4)))
    assert terminal.read_until(None) == 0, terminal.text
    assert "features of" in terminal.text and "train 2/4" in terminal.text
    own = re.sub(r"\r|\n|\x1b\[A", "", terminal.text)  # a terminal shows a line end as \r\n
    assert own.isprintable(), [each for each in own if not each.isprintable()]


@pytest.mark.program
def test_the_text_of_the_program_that_converts(tmp_path, capfd):
    """Its standard error becomes a sentence of the one that started it."""
    folder = tmp_path / f"m{NAME}"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    assert doctor.main(["--convert", str(folder)]) == 2
    assert "pytorch_model.bin" in printed(capfd)[1]
