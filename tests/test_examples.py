"""Every example of README, docs, --help and the card is run, and gives what it claims to give."""

import importlib
import re
import shutil
from pathlib import Path

import pytest
import torch

from kdfast import fused_kd_loss, train
from kdfast.cards.render import TEMPLATES
from kdfast.demo import TEACHER
from tests import examples
from tests.data.test_chunks import files_of

pytestmark = pytest.mark.program

DOCUMENTS = [examples.ROOT / "README.md", *sorted((examples.ROOT / "docs").glob("*.md"))]
PROGRAMS = [
    path.stem
    for path in sorted((examples.ROOT / "kdfast").glob("*.py"))
    if "\ndef main(" in path.read_text()
]
# Of programs that are not ours, and parts of a flag's name.
OTHER_FLAGS = {"nproc_per_node", "max_restarts", "nnodes", "array", "dependency", "long", "check"}
OTHER_FLAGS |= {"benchmark", "device", "quick", "row", "steps"}  # of benchmarks/


@pytest.fixture
def place(tmp_path, monkeypatch):
    return examples.Place(tmp_path, monkeypatch)


def help_of(program, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(f"kdfast.{program}").main(["--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_a_document(document, place):
    for line, language, code in examples.blocks(document):
        try:
            place.run(language, code)
        except Exception as error:
            raise AssertionError(f"{document.name}, line {line}: {error!r}") from error


def test_readme_has_its_examples():
    found = [(language, code) for _, language, code in examples.blocks(DOCUMENTS[0])]
    assert sum(language == "python" for language, _ in found) >= 3
    assert any(examples.CLAIM.search(code) for _, code in found)
    assert any("kdfast.train" in code for _, code in found)


def test_what_is_said_to_be_equal_to_the_loss(place):
    (definition,) = [
        code for _, _, code in examples.blocks(DOCUMENTS[0]) if "loss = w * T**2 *" in code
    ]
    place.python(definition)
    tensors = ("student_logits", "teacher_logits", "start_positions", "end_positions")
    fused = fused_kd_loss(
        *(place.names[name] for name in tensors),
        temperature=place.names["T"],
        distillation_loss_weight=place.names["w"],
    )
    torch.testing.assert_close(fused, place.names["loss"])


def test_many_machines_make_what_one_makes(place):
    """Ways of docs/clusters.md: what is left of each is the cache of one process."""
    flags = (
        "--student roberta-base --train_file dev-v2.0.json --teacher deepset/roberta-large-squad2"
    )
    place.command(f"python -m kdfast.prepare {flags} --cache_dir one")
    (page,) = [path for path in DOCUMENTS if path.name == "clusters.md"]
    ran = 0
    for _, language, code in examples.blocks(page):
        if code.startswith("#!") or "sbatch" in code or "import ray" in code or "Spark" in code:
            place.run(language, code)
            if not code.startswith("#!"):
                assert files_of(Path("cache")) == files_of(Path("one"))
                shutil.rmtree("cache")
                ran += 1
    assert ran == 3


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(program, place, capsys):
    for command in re.findall(r"^ +(python -m kdfast.*)$", help_of(program, capsys), re.MULTILINE):
        place.command(command)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_flags_that_a_document_names(document, capsys):
    known = {
        name for program in PROGRAMS for name in re.findall(r"--(\w+)", help_of(program, capsys))
    }
    text = examples.BLOCK.sub("", document.read_text(encoding="utf-8"))
    named = {
        name for code in re.findall(r"`([^`]+)`", text) for name in re.findall(r"--(\w+)", code)
    }
    assert named - known - OTHER_FLAGS == set()


def test_the_card(place):
    template = (TEMPLATES / "model_card.md").read_text()
    (code,) = re.findall("```python\n(.*?)```", template, re.DOTALL)
    code = re.sub("{{.*}}", repr(str(TEACHER)), code)
    answer, score = place.python(code).rsplit(maxsplit=1)
    assert answer in code and 0 <= float(score) <= 1


def test_a_claim_that_is_wrong_fails(place):
    place.python("print(1 + 1)  # 2")
    with pytest.raises(AssertionError):
        place.python("print(1 + 1)  # 3")
    with pytest.raises(AssertionError, match="nobody knows how to run"):
        place.run("sh", "rm x")
    with pytest.raises(AssertionError):
        place.run("sh", "python -m kdfast.evaluate --data no.json --predictions predictions.json")


def test_the_reader_example_after_make_train(place, long, monkeypatch):
    """As a user does it: with the student that the demo trains, some minutes long."""
    if not long:
        pytest.skip("trains the demo: --long")

    def make_train():
        assert train.main([]) == 0

    monkeypatch.setattr(place, "make_train", make_train)
    place.make("train")
    for _, language, code in examples.blocks(DOCUMENTS[0]):
        if language == "python" and "kdfast-demo" in code:
            place.python(code)
            return
    raise AssertionError("README has no example of make train's reader")
