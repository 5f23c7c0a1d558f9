"""Flags, --help, and how every program starts and ends; the last are real processes."""

import errno
import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest

from kdfast import card, doctor, evaluate, predict, prepare, train
from kdfast.card import CardConfig
from kdfast.command_line import PrepareSettings
from kdfast.common import program
from kdfast.common.flag_hints import USUAL
from kdfast.config import GROUPS, SETTINGS, DataSettings, WindowSettings
from kdfast.evaluation.settings import EvaluateConfig
from kdfast.predict import PredictConfig

PREPARE = (PrepareSettings, DataSettings, WindowSettings)
PROGRAMS = [
    (train.main, list(SETTINGS)),
    (prepare.main, [each.name for group in PREPARE for each in fields(group)]),
    (evaluate.main, [each.name for each in fields(EvaluateConfig)]),
    (predict.main, [each.name for each in fields(PredictConfig)]),
    (card.main, [each.name for each in fields(CardConfig)]),
]
NAMES = ("train", "prepare", "evaluate", "predict", "card", "doctor")


def help_of(main, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", program.ALLOCATOR)
def test_the_users_settings_of_gpu_memory_stay(monkeypatch, name):
    for each in program.ALLOCATOR:
        monkeypatch.setenv(each, "")  # restored in the end
        monkeypatch.delenv(each)
    monkeypatch.setenv(name, "max_split_size_mb:64")
    before = dict(os.environ)
    assert program.run(lambda argv: None, lambda settings: 0, []) == 0
    assert {key: os.environ.get(key) for key in before} == before
    assert not os.environ.keys() & {*program.ALLOCATOR} - {name}
    monkeypatch.delenv(name)
    assert program.run(lambda argv: None, lambda settings: 0, []) == 0
    # Which of them torch reads depends on its version.
    for each in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        assert os.environ[each] == "expandable_segments:True"


@pytest.mark.parametrize("main, names", PROGRAMS)
def test_help_has_every_flag_once_with_its_default(main, names, capsys):
    text = help_of(main, capsys)
    shown = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    # A flag that is on by default has a --no_ form behind it.
    assert [name for name in shown if not name.startswith("no_")] == names
    assert "(default: None)" not in text and "(default: )" not in text and "%(" not in text


def test_help_of_training_is_in_sections(capsys):
    text = help_of(train.main, capsys)
    found = re.findall(r"^(\w[^\n]*):\n  --(\w+)", text, re.MULTILINE)
    wanted = [(group._argument_group_name, fields(group)[0].name) for group in GROUPS.values()]
    assert found == wanted


def refused(main, capsys, *flags):
    """The one line that the program says of these flags."""
    assert main(list(flags)) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    return said.err


@pytest.mark.parametrize("main", [main for main, _ in PROGRAMS] + [doctor.main])
def test_an_unknown_flag_is_named(main, capsys):
    assert "--nothing is no flag of kdfast." in refused(main, capsys, "--nothing", "x")


# Flags of transformers' run_qa.py, of HF's distillation script, of Haystack, and slips of the pen.
@pytest.mark.parametrize(
    "main, flag, meant",
    [
        (train.main, "--per_device_train_batch_size=8", "--train_batch_size is meant (the windows"),
        (train.main, "--batch_size", "--train_batch_size is meant"),
        (train.main, "--fp16", "--mixed_precision is meant (--mixed_precision fp16)"),
        (train.main, "--bf16", "--mixed_precision is meant (--mixed_precision bf16)"),
        (train.main, "--lr", "--learning_rate is meant"),
        (train.main, "--num_epochs", "--num_train_epochs is meant"),
        (train.main, "--epochs", "--num_train_epochs is meant"),
        (train.main, "--model_name_or_path", "--student is meant"),
        (train.main, "--teacher_name_or_path", "--teacher is meant"),
        (train.main, "--teacher_model", "--teacher is meant"),
        (train.main, "--dataset_name", "--train_file is meant"),
        (train.main, "--warmup_steps", "--warmup_ratio is meant (a share of the steps)"),
        (train.main, "--alpha_ce", "--distillation_loss_weight is meant"),
        (train.main, "--overwrite_output_dir", "--overwrite is meant"),
        (train.main, "--per_device_eval_batch_size", "leave it out"),
        (train.main, "--learning-rat", "did you mean --learning_rate?"),
        (train.main, "--temprature", "did you mean --temperature?"),
        (train.main, "--learning_r", "did you mean --learning_rate?"),  # no abbreviation
        (evaluate.main, "--model_name_or_path", "--model is meant"),
        (evaluate.main, "--dataset_name", "--data is meant"),
        (predict.main, "--max_seq_length", "--max_seq_len is meant"),
        (predict.main, "--topk", "--top_k is meant"),
        (predict.main, "--batch_size", "leave it out"),
        (card.main, "--hub_model_id", "--push_to_hub is meant"),
    ],
)
def test_an_unknown_flag_names_the_one_that_is_meant(main, flag, meant, capsys):
    said = refused(main, capsys, flag, "3")
    assert said.startswith(f"error: {flag.partition('=')[0]} is no flag of kdfast.")
    assert meant in said


def test_no_flag_may_be_shortened_with_a_recipe(capsys):
    flags = ["--recipe", "roberta-base-squad2-distilled", "--stag", "layers"]
    assert "did you mean --stage?" in refused(train.main, capsys, *flags)


def test_a_stray_value_and_a_wrong_one_are_one_sentence(capsys):
    assert "train.json belongs to no flag" in refused(train.main, capsys, "train.json")
    assert "--seed" in refused(train.main, capsys, "--seed", "x")
    assert "one argument" in refused(evaluate.main, capsys, "--model")


def test_the_names_of_others_lead_to_flags_that_there_are():
    known = {name for _, names in PROGRAMS for name in names}
    for _, ours, _ in USUAL:
        assert set(ours.split()) <= known


@pytest.mark.program
@pytest.mark.parametrize("name", NAMES)
def test_flags_are_read_before_anything_heavy_is_imported(name):
    """Seconds differ from machine to machine; the modules that cost them do not."""
    code = (
        "import atexit, runpy, sys\n"
        "heavy = ('transformers.models', 'transformers.modeling_utils', 'datasets', 'triton',"
        " 'kdfast.reader', 'kdfast.models.load', 'kdfast.training.step', 'tokenizers')\n"
        "atexit.register(lambda: print('heavy:', *(name for name in heavy if name in sys.modules)))"
        f"\nsys.argv = ['-m', 'x', '--nothing']\n"
        f"runpy.run_module('kdfast.{name}', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "--nothing is no flag" in done.stderr
    assert done.stdout == "heavy:\n"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error", "x"), MemoryError()])
def test_what_the_system_refuses_ends_a_program_with_a_sentence(capsys, error):
    def work(settings):
        raise error

    assert program.run(lambda argv: None, work, []) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and len(said.splitlines()) == 1
