"""Several teachers, and teachers of another tokenizer, through kdfast.train."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering

from kdfast.common import precision
from kdfast.common.errors import UserError
from kdfast.common.run import Run
from kdfast.config import TrainConfig, WindowSettings
from kdfast.data.prepare import prepare_windows
from kdfast.hf import kd_dataset
from kdfast.teachers import cache as teacher
from kdfast.teachers import targets
from kdfast.teachers.alignment import Aligner
from kdfast.teachers.rewindow import rewindow
from kdfast.tokenizers.load import load_tokenizer
from kdfast.tokenizers.template import Template
from kdfast.training import inputs
from tests import readers
from tests.programs import log_of
from tests.teachers.two_tokenizers import by_the_book

TEMPERATURE = 1.5
LENGTHS = {"max_seq_length": 60, "max_query_length": 20, "doc_stride": 24}


def run(world, **changes):
    """One short run; returns its run.json."""
    assert world.run(**{**LENGTHS, "max_steps": 2, "validation_file": None, **changes}) == 0
    return json.loads(Path(changes.get("output_dir", world.output), "run.json").read_text())


def cached(world, key):
    """The logits and the header of a cache."""
    home = world.path / "cache" / "teacher" / key
    logits = np.load(home / "logits.npy")
    return logits, json.loads((home / "header.json").read_text())


def student_windows(world, student=None):
    tokenizer = load_tokenizer(Path(student or world.student), "it")
    cache = world.path / "cache"
    return prepare_windows(
        world.train_file, tokenizer, WindowSettings(**LENGTHS), cache_dir=cache, split="train"
    )


def softmax(logits, temperature=TEMPERATURE):
    weights = np.exp((logits - logits.max(axis=0)).astype(float) / temperature)
    return weights / weights.sum(axis=0)


def by_window(windows, logits, temperature=TEMPERATURE):
    """The distributions of each window."""
    bounds = zip(windows.window_start[:-1], windows.window_start[1:], strict=True)
    return [softmax(logits[begin:end], temperature) for begin, end in bounds]


def assert_near(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0.0075, atol=1e-9)


# length: what the teacher reads at most; positions of the RoBERTa kind begin behind the padding's.
@pytest.mark.parametrize(
    ("student", "other", "positions", "length"),
    [
        ("bert", "roberta", 514, 512),
        ("roberta", "xlm-roberta", 514, 512),
        ("xlm-roberta", "deberta", 512, 512),
        ("deberta-v2", "bert", 32, 32),
        ("roberta", "deberta-v2", 50, 50),
    ],
)
def test_a_teacher_of_another_tokenizer(world, capsys, student, other, positions, length):
    student = readers.save(world.path / "one", student, seed=3)
    other = readers.save(world.path / "other", other, max_position_embeddings=positions, seed=4)
    record = run(world, student=student, teacher=other)
    assert "has another tokenizer than the student" in capsys.readouterr().out
    logits, header = cached(world, record["teacher_cache"])
    assert header["kind"] == "derived" and header["temperature"] == TEMPERATURE
    (source,) = header["sources"]
    raw, raw_header = cached(world, source)
    assert raw_header["kind"] == "raw"

    windows = student_windows(world, student)
    tokenizer = load_tokenizer(Path(other), "it")
    read = rewindow(
        windows,
        world.train_file,
        tokenizer,
        WindowSettings(length, doc_stride=LENGTHS["doc_stride"]),
        cache_dir=world.path / "cache",
    )
    assert raw_header["windows"] == read.windows.key
    assert (len(read.windows) > len(windows)) == (length < 60)
    # The raw logits are the model's own on those windows.
    model = AutoModelForQuestionAnswering.from_pretrained(other, dtype=torch.float32).eval()
    for number in (0, len(read.windows) - 1):
        row = read.windows.padded([number])
        inputs = {"input_ids": torch.from_numpy(row["input_ids"])}
        if read.windows.uses_token_types:
            inputs["token_type_ids"] = torch.from_numpy(row["token_type_ids"])
        with torch.no_grad():
            out = model(**inputs)
        begin, end = read.windows.window_start[number : number + 2]
        own = torch.stack([out.start_logits[0], out.end_logits[0]], 1).numpy()
        np.testing.assert_allclose(raw[begin:end], own, rtol=2e-3, atol=2e-3)

    ours = Template.learn(load_tokenizer(Path(student), "it"))
    aligner = Aligner(windows, read, ours, Template.learn(tokenizer))
    wanted = [by_the_book(aligner, raw, window, TEMPERATURE) for window in range(len(windows))]
    for found, mass in zip(by_window(windows, logits), wanted, strict=True):
        np.testing.assert_allclose(found, mass, rtol=0.0075, atol=1e-9)
    steps = [line for line in log_of(world.output) if "step" in line]
    assert len(steps) == 2 and all(line["soft"] > 0 for line in steps)


def test_several_teachers_are_averaged(world):
    second = readers.save(world.path / "second", seed=7)
    foreign = readers.save(world.path / "foreign", "roberta", seed=8)
    windows = student_windows(world)
    alone = []
    for number, name in enumerate((world.teacher, second, foreign)):
        key = run(world, teacher=name, output_dir=world.path / str(number))["teacher_cache"]
        alone.append(by_window(windows, cached(world, key)[0]))

    record = run(world, teacher=[world.teacher, second])
    assert record["config"]["teacher"] == [world.teacher, second]
    found = by_window(windows, cached(world, record["teacher_cache"])[0])
    assert_near(found, [(a + b) / 2 for a, b, _ in zip(*alone, strict=True)])

    changes = {"teacher": [world.teacher, second, foreign], "teacher_weights": [0.5, 0.2, 0.3]}
    record = run(world, **changes, output_dir=world.path / "three")
    found = by_window(windows, cached(world, record["teacher_cache"])[0])
    mean = [0.5 * a + 0.2 * b + 0.3 * c for a, b, c in zip(*alone, strict=True)]
    assert_near(found, mean)
    assert np.abs(alone[0][0] / alone[1][0] - 1).max() > 0.3


def test_another_temperature_needs_no_pass(world, monkeypatch):
    changes = {"teacher": [world.teacher, readers.save(world.path / "other", "xlm-roberta")]}
    first = run(world, **changes)

    def refuse(*arguments):
        raise AssertionError("a teacher reads again")

    monkeypatch.setattr(targets, "fill_cache", refuse)
    second = run(world, **changes, temperature=4.0, output_dir=world.path / "warm")
    assert second["teacher_cache"] != first["teacher_cache"]
    logits, header = cached(world, second["teacher_cache"])
    assert header["sources"] == cached(world, first["teacher_cache"])[1]["sources"]
    windows = student_windows(world)
    cold = by_window(windows, cached(world, first["teacher_cache"])[0])
    warm = by_window(windows, logits, 4.0)
    assert max(each.max() for each in warm) < max(each.max() for each in cold)


def test_one_teacher_of_the_same_tokenizer_is_taken_as_it_is(world):
    record = run(world)
    home = world.path / "cache" / "teacher"
    assert [path.name for path in home.iterdir() if path.is_dir()] == [record["teacher_cache"]]
    logits, header = cached(world, record["teacher_cache"])
    assert header["kind"] == "raw" and header["windows"] == student_windows(world).key
    key = teacher.Source(*(header[n] for n in ("weights", "tokenizer", "windows", "precision")))
    assert key.key == record["teacher_cache"] and logits.max() > 0
    assert record["config"]["teacher"] == [world.teacher]
    assert run(world, distillation_loss="mse", output_dir=world.path / "mse")["steps"] == 2


def test_a_run_with_several_teachers_resumes(world, capsys):
    second = readers.save(world.path / "second", seed=7)
    changes = {"teacher": [world.teacher, second], "teacher_weights": [0.25, 0.75]}
    run(world, **changes, save_steps=1)
    resumed = {"resume_from_checkpoint": "last"}
    assert run(world, **changes, **resumed, save_steps=1)["steps"] == 2
    capsys.readouterr()
    other = {**LENGTHS, **changes, "teacher_weights": [0.75, 0.25], "max_steps": 2}
    assert world.run(**other, **resumed, validation_file=None) == 2
    assert "teacher_weights ([0.25, 0.75] -> [0.75, 0.25])" in capsys.readouterr().err


def test_one_name_is_a_list_of_one():
    assert TrainConfig(teacher="a").model == TrainConfig(teacher=["a"]).model
    assert TrainConfig(teacher="a").model.teacher == ["a"] and TrainConfig().model.teacher == []


def mistakes(world):
    foreign = readers.save(world.path / "foreign", "roberta")
    two = [world.teacher, readers.save(world.path / "second")]
    return [
        ({"teacher": two, "teacher_weights": [1]}, "are 1 for 2 --teacher"),
        ({"teacher": two, "teacher_weights": [0.5, 0.6]}, "whose sum is 1 (it is 1.1)"),
        ({"teacher": two, "teacher_weights": [1.5, -0.5]}, "give numbers above 0"),
        ({"teacher": two, "teacher_weights": [1, 0]}, "give numbers above 0"),
        ({"teacher": two, "teacher_weights": ["nan", 1]}, "give numbers above 0"),
        ({"teacher": two, "distillation_loss": "mse"}, "an average of several --teacher"),
        ({"teacher": foreign, "distillation_loss": "mse"}, "which has another tokenizer"),
        ({"teacher": foreign, "temperature": 3000}, "stored up to 2183"),
        ({"teacher": [world.teacher, "nowhere/nothing"]}, "--teacher nowhere/nothing is neither"),
        ({"teacher": two, "output_dir": two[1], "overwrite": True}, "would overwrite"),
    ]


def test_a_users_mistake_is_one_sentence(world, capsys):
    for changes, words in mistakes(world):
        assert world.run(**{**LENGTHS, **changes}) == 2, words
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("error: ") and words in message
    assert not world.output.exists() or not any(world.output.iterdir())


def test_the_hugging_face_trainers_rows_have_the_average(world):
    two = [world.teacher, readers.save(world.path / "second", seed=7)]
    settings = {**LENGTHS, "teacher": two, "student": world.student, "mixed_precision": "no"}
    settings |= {"train_file": world.train_file, "cache_dir": str(world.path / "cache")}
    rows = kd_dataset(TrainConfig(**settings))
    assert rows.temperature == TEMPERATURE
    logits, _ = cached(world, run(world, teacher=two)["teacher_cache"])
    np.testing.assert_array_equal(rows[0]["teacher_logits"], logits[: len(rows[0]["input_ids"])])
    with pytest.raises(UserError, match="an average of several --teacher"):
        kd_dataset(TrainConfig(**settings, distillation_loss="mse"))


def test_a_source_that_does_not_match_is_refused(world, capsys):
    changes = {"teacher": [world.teacher, world.student]}
    record = run(world, **changes)
    source = cached(world, record["teacher_cache"])[1]["sources"][1]
    path = world.path / "cache" / "teacher" / source / "logits.npy"
    path.write_bytes(path.read_bytes()[:-4])
    flags = {**LENGTHS, **changes, "temperature": 2.0, "output_dir": world.path / "other"}
    assert world.run(**flags) == 2
    assert "is damaged (logits.npy is not what was written)" in capsys.readouterr().err


def test_a_teacher_that_gives_no_offsets_is_refused(world, capsys):
    folder = Path(world.teacher)
    (folder / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "BertJapaneseTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert world.run(**LENGTHS) == 2
    assert "save its fast version (tokenizer.json) into that folder" in capsys.readouterr().err


def test_a_teacher_that_was_trained_without_token_types_gets_none(world):
    teacher = Path(readers.save(world.path / "untyped", seed=9))
    path = teacher / "tokenizer_config.json"
    stated = json.loads(path.read_text()) | {"model_input_names": ["input_ids", "attention_mask"]}
    path.write_text(json.dumps(stated))
    # Raw logits of the student's own windows, and so also with mse.
    key = run(world, teacher=teacher, distillation_loss="mse")["teacher_cache"]
    logits, windows = cached(world, key)[0], student_windows(world)
    assert windows.uses_token_types
    model = AutoModelForQuestionAnswering.from_pretrained(teacher, dtype=torch.float32).eval()
    for window, found in enumerate(by_window(windows, logits)[:3]):
        row = windows.padded([window])
        with torch.no_grad():
            out = model(torch.from_numpy(row["input_ids"]))
        own = torch.stack([out.start_logits[0], out.end_logits[0]], 1).numpy()
        assert_near(found, softmax(own))


def test_each_teacher_computes_in_what_is_asked_for_or_is_refused(world, capsys):
    deberta = readers.save(world.path / "deberta", "deberta")
    for kind in ("no", "fp16"):
        record = run(world, mixed_precision=kind, output_dir=world.path / kind)
        assert cached(world, record["teacher_cache"])[1]["precision"] == kind == record["precision"]
    several = {"teacher": [world.teacher, deberta], "mixed_precision": "fp16"}
    assert world.run(**LENGTHS, **several) == 2
    assert "--mixed_precision fp16: deberta is not computed in it" in capsys.readouterr().err
    # The teacher of stage layers computes with the student.
    for changes in ({"student": deberta}, {"stage": "layers", "validation_file": None}):
        assert world.run(teacher=deberta, mixed_precision="bf16", **changes) == 2
        assert "--mixed_precision bf16: deberta is not" in capsys.readouterr().err


def test_a_teacher_packs_where_it_can(world, capsys):
    deberta = readers.save(world.path / "deberta", "deberta")
    for name, packs in ((world.teacher, True), (deberta, False)):
        folders = {flag: world.path / f"{flag} {packs}" for flag in ("output_dir", "cache_dir")}
        run(world, teacher=name, packing="on", **folders)
        headers = [path.read_text() for path in folders["cache_dir"].glob("teacher/*/header.json")]
        assert any(json.loads(text).get("packed", False) for text in headers) == packs
        said = f"--packing on: {name} reads padded windows: a model of type deberta cannot"
        assert (said in capsys.readouterr().out) == (not packs)


def test_a_gpus_default_is_chosen_for_each_teacher_and_logged(world, monkeypatch, capsys):
    """Where precision is chosen, the CPU is taken for a GPU."""

    def on_gpu(asked, device, *rest):
        return precision.resolve(asked, torch.device("cuda"), *rest)

    monkeypatch.setattr(targets, "resolve", on_gpu)
    monkeypatch.setattr(precision, "_has_bf16", lambda device: True)
    several = [readers.save(world.path / "deberta", "deberta"), world.teacher]
    config = TrainConfig(
        **LENGTHS, teacher=several, train_file=world.train_file, cache_dir=str(world.path / "cache")
    )
    tokenizer = load_tokenizer(Path(world.student), "it")
    windows = student_windows(world)
    found = inputs.find_targets(config, world.train_file, windows, tokenizer, Run())
    assert [each.source.precision for each in found.teachers] == ["no", "fp16"]
    assert "--mixed_precision is no, not fp16: deberta is not" in capsys.readouterr().out
