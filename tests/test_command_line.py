import re
from dataclasses import fields

import pytest

from kdfast import card, evaluate, predict, train
from kdfast.card import CardConfig
from kdfast.distill.config import SECTIONS, TrainConfig
from kdfast.distill.evaluate_config import EvaluateConfig
from kdfast.predict import PredictConfig

PROGRAMS = [
    (train.parse, TrainConfig),
    (evaluate.main, EvaluateConfig),
    (predict.main, PredictConfig),
    (card.main, CardConfig),
]


def help_of(main, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("main, settings", PROGRAMS)
def test_help_has_every_flag_once_with_its_default(main, settings, capsys):
    text = help_of(main, capsys)
    shown = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    # A flag that is on by default has a --no_ form behind it.
    assert [name for name in shown if not name.startswith("no_")] == [
        each.name for each in fields(settings)
    ]
    assert text.count("(default:") == len(shown)


def test_help_of_training_is_in_sections(capsys):
    text = help_of(train.parse, capsys)
    found = re.findall(r"^(\w[^:\n]*):\n  --(\w+)", text, re.MULTILINE)
    assert found == [(heading, first) for first, heading in SECTIONS.items()]


@pytest.mark.parametrize("main, settings", PROGRAMS)
def test_an_unknown_flag_is_named(main, settings, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--nothing", "x"])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "unknown arguments: --nothing x" in said and len(said.splitlines()) == 2
