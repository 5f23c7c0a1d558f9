"""The recipes, and each run for two steps on shrunken models of its kind and real questions."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from kdfast import recipes, train
from kdfast.common.errors import UserError
from kdfast.config import FIXED_ON_RESUME, SETTINGS
from kdfast.config_checks import LAYERS_FLAGS, check
from kdfast.evaluation import suites
from tests import corpora, published, readers

ROOT = Path(__file__).parents[1]
ENGLISH = "squad2_train.json"
V3 = "microsoft/deberta-v3-base"
# What a recipe is proved on: teachers and student, with the configurations of `published`, and
# questions in its language.
PROOFS = {
    "bert-medium-squad2-distilled": (["bert"], "bert", ENGLISH),
    "deberta-v3-small-squad2-distilled": ([V3] * 3, V3, ENGLISH),
    "deberta-v3-xsmall-squad2-distilled": ([V3], V3, ENGLISH),
    "gelectra-base-germanquad-distilled": (["electra"], "electra", "xquad_de.json"),
    "minilm-l12-squad2-distilled": ([V3], "roberta", ENGLISH),
    "modernbert-base-squad2-distilled": ([V3], "modernbert", ENGLISH),
    "multilingual-minilm-squad2-distilled": (
        ["xlm-roberta"],
        "microsoft/Multilingual-MiniLM-L12-H384",
        ENGLISH,
    ),
    "roberta-base-squad2-distilled": (["roberta"], "roberta", ENGLISH),
    "roberta-base-squad2-from-deberta": ([V3], "roberta", ENGLISH),
    "tinybert-6l-768d-squad2": (["bert"], "bert", ENGLISH),
    "tinyroberta-squad2": (["roberta"], "roberta", ENGLISH),
    "xlm-roberta-base-squad2-distilled": (["xlm-roberta"], "xlm-roberta", ENGLISH),
}


def test_every_recipe_has_a_proof():
    assert recipes.names() == sorted(PROOFS)


@pytest.mark.parametrize("name", PROOFS)
def test_settings_are_flags_and_the_rest_is_printed(name):
    recipe = recipes.load(name)
    assert set(recipe.settings) <= set(SETTINGS) - {"recipe"}
    config = train.parse(["--recipe", name, "--output_dir", "out"])
    check(config)
    settings = config.flat()
    for flag, value in recipe.settings.items():
        value = [value] if flag == "teacher" and isinstance(value, str) else value
        assert settings[flag] == value and type(settings[flag]) is type(value)
    text = "\n".join(recipe.lines())
    if "model" in recipe.published:
        assert recipe.published["model"] in text and recipe.published["hardware"] in text
    else:
        assert text.startswith("No published reader of this recipe is known")
    for figure in recipe.published["figures"]:
        assert figure["set"] in suites.SETS and f"F1 {figure['f1']:.2f}" in text


def test_what_was_published():
    english, multilingual, german = (
        recipes.load(name).settings
        for name in (
            "roberta-base-squad2-distilled",
            "xlm-roberta-base-squad2-distilled",
            "gelectra-base-germanquad-distilled",
        )
    )
    assert (
        english.items()
        >= {
            "teacher": "deepset/roberta-large-squad2",
            "train_batch_size": 80,
            "num_train_epochs": 4.0,
            "max_seq_length": 384,
            "learning_rate": 3e-5,
            "warmup_ratio": 0.2,
            "embeds_dropout_prob": 0.1,
            "temperature": 1.5,
            "distillation_loss_weight": 0.75,
            "mixed_precision": "fp16",
        }.items()
    )
    assert {name for name in english if english[name] != multilingual[name]} == {
        "teacher",
        "student",
        "train_batch_size",
        "temperature",
    }
    assert (multilingual["train_batch_size"], multilingual["temperature"]) == (56, 3.0)
    assert recipes.load("xlm-roberta-base-squad2-distilled").published["figures"] == []
    assert (german["train_batch_size"], german["num_train_epochs"]) == (24, 6.0)


def test_what_was_published_of_two_stages():
    english, tiny = (
        recipes.load(name).settings
        for name in ("roberta-base-squad2-distilled", "tinyroberta-squad2")
    )
    assert (tiny["stage"], tiny["train_batch_size"]) == ("both", 96)
    assert tiny["layers_teacher"] == "deepset/roberta-base-squad2"
    assert {name for name in english if english[name] != tiny[name]} == {
        "student",
        "train_batch_size",
    }
    # The teacher of the first stage must have its layers and heads.
    assert tiny["attention_loss"] == "probabilities"


def test_a_recipe_of_two_stages_serves_each_of_them():
    known = ["--recipe", "tinyroberta-squad2", "--output_dir", "out"]
    both = train.parse(known)
    for stage in ("both", "layers", "predictions"):
        config = train.parse([*known, "--stage", stage])
        check(config)
        assert config.model.stage == stage
    layers = train.parse([*known, "--stage", "layers", "--learning_rate", "1e-4"])
    assert (
        layers.model.teacher == [both.model.layers_teacher]
        and layers.optimization.learning_rate == 1e-4
    )
    assert layers.optimization.num_train_epochs == both.model.layers_num_train_epochs
    assert train.parse([*known, "--stage=predictions"]).model.teacher == both.model.teacher


def test_flags_override():
    name = "xlm-roberta-base-squad2-distilled"
    config = train.parse(["--temperature", "2", "--recipe", name, "--train_file", "mine.json"])
    assert (
        config.loss.temperature,
        config.data.train_file,
        config.optimization.train_batch_size,
    ) == (
        2.0,
        ["mine.json"],
        56,
    )
    assert config.model.recipe == name and "recipe" not in FIXED_ON_RESUME


def test_list(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--recipe", "list"])
    heading, *lines = capsys.readouterr().out.splitlines()
    lines = lines[: -len(recipes.LEGEND)]
    assert ended.value.code == 0 and [line.split()[0] for line in lines] == recipes.names()
    column = heading.index("parameters")
    table = {line.split()[0]: " ".join(line[column:].split()) for line in lines}
    assert table["gelectra-base-germanquad-distilled"] == (
        "86 + 24 M 80.95 germanquad German; GELECTRA large teaches GELECTRA base"
    )
    # Of the student undistilled, where nobody published the distilled one.
    assert table["deberta-v3-xsmall-squad2-distilled"].startswith("22 + 48 M 84.80* squad_v2 ")
    assert table["xlm-roberta-base-squad2-distilled"].startswith("86 + 192 M - Multi")


def test_a_typo(capsys):
    assert train.main(["--recipe", "roberta-base-squad2-distiled"]) == 2
    assert "did you mean roberta-base-squad2-distilled?" in capsys.readouterr().err
    with pytest.raises(UserError, match="give one of bert-medium"):
        recipes.load("qqq")


def few_questions(path: Path, source: Path) -> str:
    """Two questions on each of the two shortest paragraphs of a SQuAD file's first article."""
    content = json.loads(source.read_text(encoding="utf-8"))
    del content["data"][1:]
    paragraphs = content["data"][0]["paragraphs"]
    paragraphs.sort(key=lambda paragraph: len(paragraph["context"]))
    del paragraphs[2:]
    for paragraph in paragraphs:
        del paragraph["qas"][2:]
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.mark.program
@pytest.mark.sample(4)
@pytest.mark.parametrize("name", PROOFS)
def test_a_short_run(name, tmp_path, capsys):
    teachers, student, data = PROOFS[name]
    source = few_questions(tmp_path / "questions.json", corpora.shared(data))
    recipe = recipes.load(name).settings
    # Gradients of so few windows stay finite under fp16's first loss scale.
    save = partial(readers.save, initializer_range=0.1)
    given = [
        save(tmp_path / f"teacher-{seed}", teacher, seed=seed)
        for seed, teacher in enumerate(teachers)
    ]
    own = {
        "student": save(tmp_path / "student", student, layers=1, head=False, seed=9),
        "train_file": source,
        "validation_file": source,
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
        "max_steps": 2,
    }
    if "layers_teacher" in recipe:
        own["layers_teacher"] = save(tmp_path / "layers_teacher", teachers[0], seed=8)
        own["layers_train_file"] = source
    flags = [part for flag, value in own.items() for part in (f"--{flag}", str(value))]
    assert train.main(["--recipe", name, "--teacher", *given, *flags]) == 0
    output = tmp_path / "out"
    settings = {**recipe, **own, "recipe": name, "teacher": given}
    if settings.get("stage") == "both":
        first = json.loads((output / "layers" / "run.json").read_text())
        assert first["steps"] == 2 and first["precision"] == "fp16"
        assert first["config"]["teacher"] == [own.get("layers_teacher", given[0])]
        output = output / "predictions"
        settings |= {"stage": "predictions", "output_dir": str(output), "attention_loss": "none"}
        settings |= {"student": str(tmp_path / "out" / "layers")}
        settings = {key: None if key in LAYERS_FLAGS else settings[key] for key in settings}
    record = json.loads((output / "run.json").read_text())
    assert {key: record["config"][key] for key in settings} == settings
    assert record["steps"] == 2 and record["precision"] == "fp16"
    assert record["metrics"]["total"] in (2, 4)
    saved = json.loads((output / "config.json").read_text())
    assert saved["model_type"] == published.named(student).model_type
    assert recipes.load(name).lines()[0] in capsys.readouterr().out


def test_the_package_holds_the_recipes(tmp_path):
    build = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    packed = sorted(path.stem for path in (tmp_path / "kdfast" / "recipes").glob("*.yaml"))
    assert packed == recipes.names()
