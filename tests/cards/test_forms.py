"""A wrong type anywhere in the files that a card is made of: a sentence, never another card."""

import json
from pathlib import Path

import pytest

from kdfast import card as program
from kdfast.cards import figures, forms, run_files
from kdfast.common.errors import UserError
from kdfast.common.files import sha256_of
from tests.programs import edit

RESULT = "eval/dev.eval.json"
GOLDEN = Path(__file__).parents[1] / "golden" / "earlier_run.json"


def nodes(content, above=()):
    """The path of every entry at any depth, but for all of a list but its first."""
    entries = content.items() if isinstance(content, dict) else enumerate(content[:1])
    for name, value in entries:
        yield (*above, name), value
        if isinstance(value, dict | list):
            yield from nodes(value, (*above, name))


@pytest.fixture
def publish(finished, monkeypatch):
    """Makes the card, of pictures only what they show; returns its text and what was logged."""

    def draw(files, others):
        for result in files.results:
            assert figures.points(result, [files, *others])
            assert figures.agreement_shares(files.questions(result))
        return {}

    monkeypatch.setattr(figures, "save", draw)
    settings = program.CardConfig(model_dir=str(finished.folder))

    def call():
        logged = []
        return program.write_card(settings, logged.append).text(), " ".join(logged)

    return call


@pytest.mark.parametrize("name", ["run.json", RESULT, "card.json"])
def test_a_wrong_type_anywhere_is_a_sentence(finished, publish, name):
    path = finished.folder / name
    card = publish()[0]
    whole = path.read_text()
    told = 0
    for place, value in list(nodes(json.loads(whole))):
        wrong = [["x"] if isinstance(value, dict) else {"x": [1]}]
        wrong += ["\ud800" if isinstance(value, str) else None, "absent"]
        for each in wrong:
            content = json.loads(whole)
            at = content
            for step in place[:-1]:
                at = at[step]
            if each == "absent":
                del at[place[-1]]
            else:
                at[place[-1]] = each
            path.write_text(json.dumps(content))
            try:
                text, logged = "", " ".join(run_files.read_run(finished.folder).notes)
                if not logged:
                    text, logged = publish()
                is_told = str(path) in logged
            except UserError as error:
                text, is_told = "", str(path) in str(error)
                assert is_told, error
            told += is_told
            may_lack = isinstance(each, str | None)
            assert is_told or may_lack or text == card, (place, each, text)
            path.write_text(whole)
            if not is_told and not may_lack:  # nothing that is read
                break
    assert told > (3 if name == "card.json" else 50)


def test_a_result_that_compares_with_nothing_and_one_of_no_data(finished, publish):
    edit(finished.folder, RESULT, compared_with=None)
    assert "damaged (see its compared_with)" in publish()[1]
    edit(finished.folder, RESULT, compared_with={}, file=None)
    assert "is left out, as it is damaged" in publish()[1]


def test_questions_that_are_damaged_are_refused(finished, publish):
    path = finished.folder / "eval" / "dev.questions.json"
    for wrong in ("{", '{"a": 1}', '{"a": {"answer": "", "exact": 0, "f1": 0}}'):
        path.write_text(wrong)
        with pytest.raises(UserError, match=r"dev\.questions\.json is damaged"):
            publish()
    path.unlink()
    (result,) = run_files.read_run(finished.folder).results
    assert run_files.read_run(finished.folder).questions(result) == {}


def test_answers_of_another_evaluation_are_refused(finished):
    """As a kill between the two files of an evaluation leaves them."""
    files = run_files.read_run(finished.folder)
    (result,) = files.results
    assert files.questions(result)
    path = finished.folder / "eval" / "dev.questions.json"
    path.write_text(path.read_text() + " ")
    edit(finished.folder, RESULT, questions_sha256=sha256_of(path))
    (again,) = run_files.read_run(finished.folder).results
    assert files.questions(again)
    edit(finished.folder, RESULT, questions_sha256="0" * 64)
    (other,) = run_files.read_run(finished.folder).results
    with pytest.raises(UserError, match=r"is not of the evaluation in .*dev\.eval\.json: "):
        files.questions(other)


def test_lines_of_the_log_that_are_damaged_are_left_out(finished, publish):
    path = finished.folder / "train_log.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0].replace('"soft": ', '"soft": ["x"], "s": '), *lines[1:]]))
    assert "no line of 1 of the first 6 steps" in publish()[1]


def test_files_of_earlier_versions_have_the_form():
    earlier = json.loads(GOLDEN.read_text())
    for name in ("run", "layers_run"):
        assert forms.run_form(earlier[name]) is None
        assert forms.run_form(earlier[name] | {"of a later version": [1]}) is None
    run = earlier["run"]
    for name in ("metric", "ranks", "layers_stage", "local_paths", "train_speed"):
        assert forms.run_form({k: v for k, v in run.items() if k != name}) is None
    for change in ({"teacher": None}, {"teacher": []}, {"validation_file": None}):
        assert forms.run_form(run | {"config": run["config"] | change}) in (
            "config.teacher",
            "config.validation_file",
        )
