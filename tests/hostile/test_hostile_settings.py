"""Settings that nobody meant: taken, or refused in one sentence, and no memory is taken first."""

import json
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdfast import evaluate, train
from kdfast.common.errors import UserError
from kdfast.common.settings import LARGEST
from kdfast.config import SETTINGS, TrainConfig
from kdfast.config_checks import check
from kdfast.evaluation.settings import EvaluateConfig
from tests.hostile.mutations import AWKWARD, VALUES, check_sentence, examples

NAMES = {
    TrainConfig: list(SETTINGS),
    EvaluateConfig: [each.name for each in fields(EvaluateConfig)],
}
GOOD = {
    TrainConfig: {"teacher": "t", "student": "s", "train_file": "f", "output_dir": "o"},
    EvaluateConfig: {"data": ["d"], "model": "m"},
}


@pytest.mark.parametrize("config", NAMES)
@examples(60)
@given(data=st.data())
def test_values_of_any_type(config, data):
    changes = data.draw(st.dictionaries(st.sampled_from(NAMES[config]), VALUES, max_size=4))
    try:
        settings = config(**GOOD[config] | changes)
        check(settings) if config is TrainConfig else settings.check()
    except UserError as error:
        check_sentence(error)


WORDS = [str(each) for each in AWKWARD if each not in ("\ud800", "\0")]  # no argument holds these
TEXTS = st.sampled_from([*WORDS, "1e400", "-0", "1_0", "0x10", "~nobody/x"])


@pytest.mark.parametrize("main", [train.parse, evaluate.main])
@examples(30)
@given(data=st.data())
def test_command_lines(main, data, capsys):
    names = st.sampled_from([f"--{name}" for name in NAMES[TrainConfig]] + ["--", "-x", "--help"])
    words = data.draw(st.lists(st.one_of(names, TEXTS, st.text(max_size=5)), max_size=6))
    try:
        found = main(words)
        if main is train.parse:
            if words:  # without any, the demo is meant
                check(found)
        else:
            assert found == 2
    except SystemExit as stopped:
        assert stopped.code == 0  # --help
    except UserError as error:
        assert main is train.parse  # the others print it
        check_sentence(error)
    finally:
        capsys.readouterr()


LIMITS = {
    "n_best_size": 10**9,
    "train_batch_size": 10**12,
    "max_steps": 10**12,
    "num_train_epochs": 1e300,
    "max_tokens_per_micro_batch": 10**400,
    "gradient_accumulation_steps": 2**31,
    "temperature": 1e200,
    "max_answer_length": 10**15,
    "max_seq_length": 10**15,
    "learning_rate": 1e300,
    "seed": 2**32,
    "save_total_limit": 2**40,
}


@pytest.mark.parametrize("name", LIMITS)
def test_what_is_too_large_is_refused_at_once(name):
    config = TrainConfig(**GOOD[TrainConfig], **{name: LIMITS[name]})
    with pytest.raises(UserError, match=f"--{name} is "):
        check(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_best_size": 1000, "max_answer_length": LARGEST}
        | {"train_batch_size": LARGEST, "max_tokens_per_micro_batch": 2**24, "num_train_epochs": 1}
        | {
            "max_steps": -1,
            "temperature": 10**6,
            "save_total_limit": LARGEST,
            "save_steps": LARGEST,
        },
        {"gradient_accumulation_steps": 2**24, "temperature": 1e-30, "max_steps": 1}
        | {"train_batch_size": 1, "max_grad_norm": 1e-30, "validation_file": None},
        {"learning_rate": LARGEST, "weight_decay": LARGEST, "warmup_ratio": 0, "max_steps": 1}
        | {"validation_file": None, "save_steps": 1},
    ],
)
def test_the_largest_settings_that_are_taken(world, capsys, changes):
    status = world.run(**changes)
    said = capsys.readouterr()
    assert status in (0, 2) and "Traceback" not in said.err
    assert "Out of memory" not in said.out
    if status == 2:
        check_sentence(said.err.strip().splitlines()[-1])
        assert not list(world.output.glob("checkpoint-*"))
        assert not (world.output / "model.safetensors").exists()
    else:
        assert json.loads((world.output / "run.json").read_text())["updates"] == 1
