"""Training on several files: each cached by itself, drawn by its weight, counted by its name."""

import json

import pytest

from kdfast import card
from kdfast.training import checkpoint
from tests import corpora, readers
from tests.programs import World, config_of, log_of, ranks_of


@pytest.fixture
def world(tmp_path):
    found = World(tmp_path)
    data = [corpora.article(number) for number in range(20, 28)]
    for each in data:
        each["paragraphs"][0]["qas"][0]["id"] += "b"
    found.other = str(tmp_path / "other.json")
    (tmp_path / "other.json").write_text(json.dumps({"data": data}))
    return found


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


def mixed(world, **changes):
    return {
        "train_file": [world.train_file, world.other],
        "train_weights": [0.5, 2],
        "train_languages": ["en", "de"],
        "validation_file": None,
        **changes,
    }


def test_files_are_drawn_by_their_weights_and_counted_by_language(world, capsys):
    assert world.run(**mixed(world, num_train_epochs=1, max_steps=None)) == 0
    said = capsys.readouterr().out
    assert f"{world.train_file}: 40 of 40 questions in en; an epoch draws 20 of 40 windows." in said
    assert f"{world.other}: 16 of 16 questions in de; an epoch draws 32 of 16 windows." in said
    assert len(log_of(world.output)) == -(-(20 + 32) // 8)
    record = record_of(world.output)
    first, second = record["questions"].pop("files")
    assert record["questions"] == {"read": 56, "trained": 56, "left_out": {}}
    assert record["train_windows"] == 56
    assert first == {
        "file": world.train_file,
        "language": "en",
        "weight": 0.5,
        "read": 40,
        "trained": 40,
        "left_out": {},
        "unlabelled": 0,
        "windows": 40,
    }
    assert (second["language"], second["weight"], second["trained"]) == ("de", 2, 16)
    assert config_of(world.output)["train_file"] == [world.train_file, world.other]
    text = (world.output / "README.md").read_text()
    assert "language:\n- en\n- de\n" in text and "`train.json`, `other.json`" in text
    assert "- `other.json`: 16 questions in de, drawn 2 times in an epoch." in text
    assert card.main(["--model_dir", str(world.output), "--language", "fr"]) == 0
    assert "language: fr" in (world.output / "README.md").read_text()


def test_features_and_logits_of_a_file_serve_it_in_any_company(world):
    for files in ([world.train_file], [world.other]):
        assert world.run(train_file=files, output_dir=world.path / files[0][-7:-5]) == 0
    caches = [world.path / "cache" / name for name in ("features", "teacher")]
    before = [sorted(path.name for path in each.iterdir()) for each in caches]
    assert world.run(**mixed(world, validation_file=world.validation_file)) == 0
    assert [sorted(path.name for path in each.iterdir()) for each in caches] == before
    record = record_of(world.output)
    assert sorted(record["teacher_cache"]) == sorted(
        record_of(world.path / name)["teacher_cache"] for name in ("in", "er")
    )


def test_one_file_given_twice_is_one_that_is_drawn_twice(world):
    """The same windows in other places: the same loss of a step over all of them."""
    still = {"embeds_dropout_prob": 0, "max_steps": 1, "validation_file": None}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    still["student"] = readers.save(world.path / "still", **no_dropout)
    for name, files, weights in (
        ("both", [world.other, world.other], None),
        ("twice", [world.other], [2]),
    ):
        flags = {"train_file": files, "train_weights": weights, "output_dir": world.path / name}
        assert world.run(**flags, **still, train_batch_size=32) == 0
    (both,), (twice,) = (log_of(world.path / name) for name in ("both", "twice"))
    assert both["windows"] == twice["windows"] == 32
    assert both["loss"] == pytest.approx(twice["loss"], rel=1e-5)
    assert both["grad_norm"] == pytest.approx(twice["grad_norm"], rel=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one_and_other_files_are_refused(world, capsys):
    flags = mixed(world, save_steps=2, save_total_limit=9)
    assert world.run(**flags, output_dir=world.path / "whole") == 0
    assert world.run(**flags) == 0
    for step in (6, 4):
        checkpoint.set_aside(world.output / f"checkpoint-{step}")
    again = {**flags, "resume_from_checkpoint": "last"}
    for wrong, named in (
        ({"train_file": [world.train_file, world.validation_file]}, "training data, teacher's"),
        ({"train_file": world.other, "train_weights": None, "train_languages": None}, "weights"),
        ({"train_weights": [1, 2]}, "train_weights ([0.5, 2.0] -> [1.0, 2.0])"),
    ):
        capsys.readouterr()
        assert world.run(**{**again, **wrong}) == 2
        assert named in capsys.readouterr().err
    assert world.run(**again) == 0
    assert log_of(world.output) == log_of(world.path / "whole")
    for name in ("model.safetensors",):
        assert (world.output / name).read_bytes() == (world.path / "whole" / name).read_bytes()


def test_several_ranks_train_on_several_files(world):
    assert world.run(**mixed(world), output_dir=world.path / "alone") == 0
    statuses, said = ranks_of(world, 2, **mixed(world, cache_dir=world.path / "new"))
    assert statuses == [0, 0], said
    for one, other in zip(log_of(world.path / "alone"), log_of(world.output), strict=True):
        assert (one["windows"], one["tokens"]) == (other["windows"], other["tokens"])


def test_teachers_of_another_tokenizer_read_every_file(world):
    other = readers.save(world.path / "roberta", "roberta", seed=4)
    several = {"teacher": [world.teacher, other], "max_steps": 2}
    assert world.run(**mixed(world), **several) == 0
    assert len(record_of(world.output)["teacher_cache"]) == 2


def test_stage_both_takes_files_of_its_own_for_layers(world, wide):
    flags = mixed(world, stage="both", max_steps=2)
    del flags["train_languages"]
    assert world.run(**flags, layers_train_file=[world.other, world.validation_file]) == 0
    layers, answers = (config_of(world.output / name) for name in ("layers", "predictions"))
    assert layers["train_file"] == [world.other, world.validation_file]
    assert layers["train_weights"] is None and answers["train_weights"] == [0.5, 2]
    text = (world.output / "predictions" / "README.md").read_text()
    assert "on `other.json` and `dev.json`" in text
    again = world.path / "again"
    assert world.run(**flags, output_dir=again) == 0
    assert config_of(again / "layers")["train_weights"] == [0.5, 2]


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"train_weights": [1]}, "--train_weights 1.0 are 1 for 2 --train_file: give one for each"),
        ({"train_weights": [1, 0]}, "give numbers above 0, 1000 at most"),
        ({"train_weights": [1, "nan"]}, "give numbers above 0, 1000 at most"),
        ({"train_languages": ["en"]}, "--train_languages en are 1 for 2 --train_file"),
        ({"train_languages": ["en", "German"]}, "--train_languages German: give codes such as"),
        ({"train_file": ["", "x"]}, "--train_file is given an empty name"),
        ({"train_file": ["{train}", "absent.json"]}, "'absent.json': no such file"),
    ],
)
def test_mistakes(world, capsys, flags, message):
    flags = mixed(world, train_weights=None, train_languages=None) | flags
    flags["train_file"] = [each.format(train=world.train_file) for each in flags["train_file"]]
    assert world.run(**flags) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1


def test_a_file_without_a_question_to_train_on_is_named(world, capsys):
    data = [{"id": "a", "question": "Who?", "context": "Rollo", "answers": ["Otto"]}]
    (world.path / "other.json").write_text(json.dumps(data))
    assert world.run(**mixed(world)) == 2
    captured = capsys.readouterr()
    assert f"{world.other}: 1 of 1 questions have an answer that is not in their" in captured.out
    assert f"--train_file {world.other} has no question to train on" in captured.err


def test_an_unlabelled_file_teaches_by_the_teacher_alone(world, capsys):
    """Its windows give weight * soft, and no hard term: answers in it are ignored."""
    flags = mixed(world, train_weights=None, train_languages=None, max_steps=1)
    flags |= {"train_batch_size": 60, "embeds_dropout_prob": 0.0}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    flags["student"] = readers.save(world.path / "still", **no_dropout)
    runs = {
        "labelled": {"train_file": [world.train_file]},
        "unlabelled": {"train_file": [world.other]},
        "both": {"train_file": [world.train_file], "unlabelled_file": [world.other]},
    }
    for name, files in runs.items():
        assert world.run(**{**flags, **files}, output_dir=world.path / name) == 0
    said = capsys.readouterr().out
    assert f"{world.other}: 16 of 16 questions, 16 without a label; an epoch draws 16" in said
    one, other, both = (log_of(world.path / name)[0] for name in runs)
    assert both["windows"] == one["windows"] + other["windows"] == 56
    soft = (40 * one["soft"] + 16 * other["soft"]) / 56
    assert both["soft"] == pytest.approx(soft, rel=1e-5)
    assert both["hard"] == pytest.approx(40 * one["hard"] / 56, rel=1e-5)
    assert both["loss"] == pytest.approx(0.75 * both["soft"] + 0.25 * both["hard"], rel=1e-5)
    record = record_of(world.path / "both")
    assert [each["unlabelled"] for each in record["questions"]["files"]] == [0, 16]
    assert config_of(world.path / "both")["unlabelled_file"] == world.other
    text = (world.path / "both" / "README.md").read_text()
    assert "- `other.json`: 16 questions, 16 of them without a label, drawn 1 times" in text
    assert "**Training data:** `train.json`, `other.json`" in text


def test_questions_that_training_would_leave_out_teach_without_a_label(world, capsys):
    data = [{"id": "a", "question": "Who?", "context": "Rollo", "answers": ["Otto"]}]
    data += [{"id": "b", "question": "Who?", "context": "Rollo of Normandy"}]
    data += [{"id": "c", "question": "Who?"}]
    (world.path / "other.json").write_text(json.dumps(data))
    flags = mixed(world, train_file=world.train_file, unlabelled_file=world.other)
    assert world.run(**flags, save_steps=6) == 0
    assert "not in their context" not in capsys.readouterr().out
    entry = record_of(world.output)["questions"]["files"][1]
    assert (entry["read"], entry["trained"], entry["unlabelled"]) == (3, 2, 2)
    assert entry["left_out"] == {"no_context": 1} and entry["weight"] == 2
    (world.path / "other.json").write_text(json.dumps(data[:2]))
    again = {**flags, "train_file": [world.train_file, world.other], "unlabelled_file": None}
    data[0]["answers"] = ["Rollo"]
    assert world.run(**again, resume_from_checkpoint="last", save_steps=6) == 2
    assert "training data" in capsys.readouterr().err


def test_the_same_file_with_labels_and_without_is_another_run(world, capsys):
    flags = mixed(world, save_steps=6)
    unlabelled = {**flags, "train_file": world.train_file, "unlabelled_file": world.other}
    assert world.run(**flags) == 0
    capsys.readouterr()
    assert world.run(**unlabelled, resume_from_checkpoint="last") == 2
    assert "these differ: training data. " in capsys.readouterr().err


def test_an_unlabelled_file_needs_a_teacher_for_answers(world, capsys):
    flags = mixed(world, train_file=world.train_file, unlabelled_file=[world.other])
    assert world.run(**flags, teacher=None, distillation_loss_weight=0) == 2
    assert "--unlabelled_file teaches by the teacher's answers alone" in capsys.readouterr().err
    assert world.run(**{**flags, "train_weights": [1]}) == 2
    wanted = "--train_weights 1.0 are 1 for 1 --train_file and 1 --unlabelled_file: give one"
    assert wanted in capsys.readouterr().err
    assert world.run(**flags, stage="layers", max_steps=1) == 0
