"""The card of a run: every figure from a result file, and the way to the hub."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from kdfast import card as program
from kdfast.cards import figures, model_card, run_files
from tests.programs import edit

SET = "dev"


def write(folder: Path, **arguments) -> tuple[dict, str]:
    """The card's front matter and its body."""
    files = run_files.read_run(folder)
    model_card.write_results(files)
    loaded = ModelCard(model_card.card_of(files, {}, **arguments))
    return loaded.data.to_dict(), loaded.text


def without_results(folder: Path) -> None:
    for path in (folder / "eval").iterdir():
        path.unlink()


def numbers(content) -> list[float]:
    """All numbers in values of JSON, and in its strings."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        return [number for each in content for number in numbers(each)]
    if isinstance(content, str):
        return [float(each) for each in re.findall(r"\d+(?:\.\d+)?", content)]
    return [] if content is None else [float(content)]


def test_every_run_ends_with_a_card(finished):
    loaded = ModelCard.load(finished.folder / "README.md")
    result = json.loads((finished.folder / "eval" / f"{SET}.eval.json").read_text())
    found = {each.metric_type: each for each in loaded.data.eval_results}
    assert found["f1"].metric_value == pytest.approx(result["metrics"]["f1"], abs=5e-5)
    assert found["exact_match"].metric_value == pytest.approx(result["metrics"]["exact"], abs=5e-5)
    assert found["f1"].dataset_name == SET and found["f1"].dataset_type == "dev.json"
    assert (loaded.data.library_name, loaded.data.pipeline_tag) == (
        "transformers",
        "question-answering",
    )
    for unknown in ("language", "license", "datasets", "base_model"):  # all of it was local files
        assert getattr(loaded.data, unknown) is None
    headings = re.findall("^## (.*)$", loaded.text, re.M)
    assert headings == [
        *("Overview", "Details", "Hyperparameters", "Performance", "Course of the run"),
        *("Limits", "Usage"),
    ]
    for name in re.findall(r"!\[.*?\]\((.*?)\)", loaded.text):
        assert (finished.folder / name).is_file()


def test_no_figure_that_is_not_in_a_result_file(finished):
    """Every number of the body is one of the files', rounded as it stands there."""
    read = [finished.folder / "run.json", *(finished.folder / "eval").glob("*.eval.json")]
    known = numbers([json.loads(path.read_text()) for path in read])
    known += [100 * each for each in known]
    known += [-each for each in known]  # the sign is no digit of what is said
    _, text = write(finished.folder)
    text = text.partition("## Usage")[0]
    said = re.findall(r"(?<![\w.])\d+(?:\.\d+)*(?![\w])", text.replace("F1", ""))
    assert len(said) > 40
    foreign = []
    for each in said:
        digits = len(each.partition(".")[2])
        if each.count(".") < 2 and not any(f"{n:.{digits}f}" == each for n in known):
            foreign.append(each)
    assert not foreign, text


def test_no_file_no_sentence(finished):
    without_results(finished.folder)
    front, text = write(finished.folder)
    run = edit(finished.folder, "run.json")
    assert f"F1 {run['metrics']['f1']:.2f}" in text and "latency" not in text.lower()
    assert front["model-index"][0]["results"][0]["metrics"][1]["value"] == pytest.approx(
        run["metrics"]["f1"], abs=5e-5
    )
    edit(finished.folder, "run.json", metrics=None, train_speed=None)
    front, text = write(finished.folder)
    for word in ("Performance", "F1", "EM", "Eval data", "windows/s", "Throughput"):
        assert word not in text
    assert "model-index" not in front and "metrics" not in front


def test_figures_follow_the_files(finished):
    name = f"eval/{SET}.eval.json"
    edit(
        finished.folder,
        name,
        metrics__f1=12.345678,
        compared__metrics__f1=65.4321,
        model__latency__median_ms=7.654,
        compared_with__latency__median_ms=98.76,
        compared_with__parameters=123456789,
    )
    front, text = write(finished.folder)
    assert front["model-index"][0]["results"][0]["metrics"][1]["value"] == 12.3457
    for said in ("12.35", "the teacher: EM", "65.43", "| 7.7 ms", "| teacher | 123456789 | 98.8"):
        assert said in text
    edit(finished.folder, name, compared_with__name="someone/else")
    _, text = write(finished.folder)
    assert "the other one is `someone/else`" in text and "| someone/else | 123456789" in text


def test_results_of_other_weights_are_left_out(finished):
    edit(finished.folder, f"eval/{SET}.eval.json", model__weights_sha256="0" * 64)
    (finished.folder / "eval" / "torn.eval.json").write_text('{"format": 1, "mod')
    files = run_files.read_run(finished.folder)
    assert files.results == [] and len(files.notes) == 2
    assert "other weights" in files.notes[0] and "cannot read" in files.notes[1]


def test_steps_that_the_log_lacks_are_counted_in_notes_and_captions(finished):
    log = finished.folder / "train_log.jsonl"
    lines = log.read_text().splitlines()
    assert '"step": 2' in lines[2]
    log.write_text("\n".join([*lines[:2], lines[2][:-1], *lines[3:]]))
    files = run_files.read_run(finished.folder)
    (note,) = files.notes
    assert "no line of 1 of the first 6 steps, the earliest being step 2" in note
    captions = figures.save(files)
    assert "no line of 1 of the first 6 steps" in captions["figures/loss.png"]


@pytest.mark.parametrize("damage", ["lost", "changed"])
def test_a_best_evaluation_that_the_log_lacks_is_said(finished, damage):
    log = finished.folder / "train_log.jsonl"
    lines = log.read_text().splitlines()
    best = next(json.loads(line) for line in lines if "evaluated_after" in line)
    edit(
        finished.folder,
        "run.json",
        best_f1=best["f1"],
        best_steps=best["evaluated_after"],
        config__load_best_model_at_end=True,
    )
    assert run_files.read_run(finished.folder).metrics()["f1"] == best["f1"]
    others = [line for line in lines if json.loads(line) != best]
    if damage == "changed":
        others.append(json.dumps(best | {"f1": best["f1"] + 10}))
    log.write_text("\n".join(others) + "\n")
    files = run_files.read_run(finished.folder)
    assert files.metrics() is None and "no line of the best evaluation" in files.notes[-1]


def test_the_best_model_has_the_best_evaluation(finished):
    without_results(finished.folder)
    log = finished.folder / "train_log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    evaluations = [line for line in lines if "evaluated_after" in line]
    evaluations[0] |= {"f1": 77.7777, "exact": 66.6666}
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    best = {"best_f1": 77.7777, "config__load_best_model_at_end": True}
    for steps in (evaluations[0]["evaluated_after"], None):  # earlier versions do not name it
        edit(finished.folder, "run.json", **best, best_steps=steps)
        assert "EM 66.67, F1 77.78" in write(finished.folder)[1]
    edit(finished.folder, "run.json", best_f1=77.7777, config__load_best_model_at_end=False)
    assert "F1 77.78" not in write(finished.folder)[1]


def test_hub_names_stand_in_the_front_matter(finished):
    edit(
        finished.folder,
        "run.json",
        config__teacher=["deepset/roberta-large-squad2"],
        config__student="FacebookAI/roberta-base",
        config__train_file="rajpurkar/squad_v2:squad_v2:train",
        config__validation_file="rajpurkar/squad_v2:squad_v2:validation",
    )
    hub = {"file": None, "dataset": "rajpurkar/squad_v2", "config": "squad_v2"}
    result = edit(finished.folder, f"eval/{SET}.eval.json", **hub, split="validation")
    front, text = write(finished.folder, repo_id="me/reader", license="cc-by-4.0")
    assert front["datasets"] == ["rajpurkar/squad_v2"] and front["language"] == "en"
    assert front["base_model"] == "FacebookAI/roberta-base" and front["license"] == "cc-by-4.0"
    assert front["model-index"][0]["name"] == "me/reader" and 'Reader("me/reader")' in text
    (entry,) = front["model-index"][0]["results"]
    assert entry["dataset"] == {
        "name": SET,
        "type": "rajpurkar/squad_v2",
        "config": "squad_v2",
        "split": "validation",
    }
    assert "`deepset/roberta-large-squad2` into `FacebookAI/roberta-base`" in text
    written = yaml.safe_load((finished.folder / f".eval_results/{SET}.yaml").read_text())
    (newer,) = parse_eval_result_entries(written)
    assert (newer.dataset_id, newer.task_id) == ("rajpurkar/squad_v2", "squad_v2")
    assert newer.value == round(result["metrics"]["f1"], 4)
    assert f"{result['metrics']['exact']:.4f}" in newer.notes
    assert write(finished.folder, language="de,es")[0]["language"] == ["de", "es"]

    # A set that was evaluated no more goes; what others put there stays.
    (finished.folder / ".eval_results" / "mine.yaml").write_text("of mine")
    (finished.folder / f"eval/{SET}.eval.json").unlink()
    write(finished.folder)
    left = [path.name for path in (finished.folder / ".eval_results").iterdir()]
    assert left == ["mine.yaml"]


def test_a_local_copy_is_not_the_hubs_set(finished):
    """A set of a suite that was read from a file: it may be any file."""
    edit(finished.folder, f"eval/{SET}.eval.json", dataset="rajpurkar/squad_v2", name="squad_v2")
    front, text = write(finished.folder)
    assert front["model-index"][0]["results"][0]["dataset"]["type"] == "dev.json"
    assert not list((finished.folder / ".eval_results").glob("*"))
    assert "`squad_v2` was read from the file `dev.json`." in text


def test_worst_forms_have_figures_of_their_own(finished):
    worst = {"metrics": {"exact": 11.0, "f1": 22.0, "total": 5}, "intervals": {}}
    edit(finished.folder, f"eval/{SET}.eval.json", worst_forms=worst)
    front, _ = write(finished.folder)
    (entry,) = front["model-index"][0]["results"]
    said = {each["name"]: each["value"] for each in entry["metrics"]}
    assert said["F1, worst forms"] == 22.0 and said["Exact Match, worst forms"] == 11.0


def test_hyperparameters_under_both_names(finished):
    edit(finished.folder, "run.json", config__max_steps=-1, config__learning_rate=3e-5)
    text = write(finished.folder)[1]
    for row in (
        "| `batch_size` | `train_batch_size` | 8 |",
        "| `n_epochs` | `num_train_epochs` | 4 |",
        "| `max_seq_len` | `max_seq_length` | 200 |",
        "| `learning_rate` | `learning_rate` | 3e-05 |",
        "| `lr_schedule` | `warmup_ratio` | LinearWarmup, over 0.2 of the steps |",
        "| `embeds_dropout_prob` | `embeds_dropout_prob` | 0.1 |",
        "| `temperature` | `temperature` | 1.5 |",
        "| `distillation_loss_weight` | `distillation_loss_weight` | 0.75 |",
    ):
        assert row in text
    edit(finished.folder, "run.json", config__max_steps=6, config__distillation_loss_weight=0.0)
    text = write(finished.folder)[1]
    assert "`max_steps` | 6" in text and "`n_epochs`" not in text
    assert "not distilled" in text and "temperature" not in text


def test_the_versions_line(finished):
    versions = {"python": "3.10.1", "cuda": None, "kdfast": "0.9.8", "torch": "2.5.0+cu126"}
    edit(finished.folder, "run.json", versions=versions)
    lines = write(finished.folder)[1].splitlines()
    assert "- Versions: python 3.10.1, kdfast 0.9.8, torch 2.5.0+cu126." in lines
    assert "- **Code:** kdfast 0.9.8, `python -m kdfast.train`" in lines


def test_terms_of_model_data_and_teacher(finished):
    edit(finished.folder, "run.json", config__teacher=["a/b", "c/d"], config__train_file="e/f")
    text = " ".join(write(finished.folder, license="mit")[1].split())
    assert "The model's license is `mit`. Read the terms of the training data, `e/f`, and" in text
    assert "of `a/b` and `c/d`, before you use it." in text
    edit(finished.folder, "run.json", config__distillation_loss_weight=0.0)
    text = " ".join(write(finished.folder)[1].split())
    assert "license is" not in text and "the training data, `e/f`, before you use it." in text


def test_names_that_are_markup(finished):
    without_results(finished.folder)
    edit(finished.folder, "run.json", config__train_file="/data/a`b|c\n# {{ 7 * 7 }}.json")
    assert "`` a`b|c # {{ 7 * 7 }}.json ``" in write(finished.folder)[1]


def test_the_usage_block_runs(finished, capsys):
    pytest.importorskip("kdfast.reader")
    block = re.search("```python\n(.*?)```", write(finished.folder)[1], re.S)[1]
    exec(block, {})
    assert re.fullmatch(r".* [01]\.\d+(e-\d+)?", capsys.readouterr().out.strip())


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--language", "xx"], "'xx' is no ISO 639 code"),
        (["--language", "de,"], "'' is no ISO 639 code"),
        (["--push_to_hub", "a/b/c"], "no repository's id"),
    ],
)
def test_what_the_card_cannot_say(world, finished, capsys, flags, said):
    assert program.main(["--model_dir", str(finished.folder), *flags]) == 2
    assert said in capsys.readouterr().err
    assert world.run(**{flags[0][2:]: flags[1]}) == 2  # before anything is trained
    assert said in capsys.readouterr().err and not world.output.exists()


def test_a_folder_without_a_run(tmp_path, capsys):
    assert program.main(["--model_dir", str(tmp_path)]) == 2
    assert "holds no run.json" in capsys.readouterr().err
    assert program.main([]) == 2
    assert "--model_dir is missing" in capsys.readouterr().err


def test_a_local_base_model_read_elsewhere(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where neither is a folder
    named = {"config__student": "models/small", "config__train_file": "sets/train"}
    edit(finished.folder, "run.json", **named)
    front, text = write(finished.folder)
    assert front["base_model"] == "models/small" and front["datasets"] == ["sets/train"]
    edit(finished.folder, "run.json", local_paths=["models/small", "sets/train"])
    front, text = write(finished.folder)
    assert "base_model" not in front and "datasets" not in front
    assert "`small`" in text and "models/small" not in text


def test_a_run_names_what_was_local(finished):
    run = edit(finished.folder, "run.json")
    names = ("student", "train_file", "validation_file")
    assert run["local_paths"] == [
        run["config"]["student"],
        *run["config"]["teacher"],
        *(run["config"][name] for name in names[1:]),
    ]


def test_later_cards_keep_what_a_card_was_given(finished, tmp_path, monkeypatch, capsys):
    other = shutil.copytree(finished.folder, tmp_path / "other")
    flags = ["--model_dir", str(finished.folder)]
    given = ["--beside", str(other), "--license", "mit", "--language", "de"]
    shown = []
    save = figures.save
    monkeypatch.setattr(
        figures, "save", lambda run, others: shown.append(others) or save(run, others)
    )
    for more in (given, [], ["--license", "cc-by-4.0"]):
        assert program.main([*flags, *more]) == 0
        assert [each.folder for each in shown.pop()] == [other]
    front, _ = write_again(finished.folder)
    assert (front["license"], front["language"]) == ("cc-by-4.0", "de")
    shutil.rmtree(other)
    capsys.readouterr()
    assert program.main(flags) == 0
    assert shown == [[]] and f"{other}, which the card had" in capsys.readouterr().out
    assert program.main([*flags, "--beside", str(other)]) == 2  # now it is a mistake
    (finished.folder / "card.json").unlink()
    for name in ("card.json", "run.json"):
        for damaged in ("[]", "{", ""):
            (finished.folder / name).write_text(damaged)
            capsys.readouterr()
            assert program.main(flags) == 2
            assert f"{name} is damaged" in capsys.readouterr().err
        (finished.folder / "card.json").unlink(missing_ok=True)


def write_again(folder: Path) -> tuple[dict, str]:
    """The front matter and body of the card that is there."""
    loaded = ModelCard.load(folder / "README.md")
    return loaded.data.to_dict(), loaded.text


def test_the_rule_of_a_figure(finished):
    edit(finished.folder, f"eval/{SET}.eval.json", metric="mlqa", language="zh")
    front, text = write(finished.folder)
    names = {each["name"] for each in front["model-index"][0]["results"][0]["metrics"]}
    assert names == {"Exact Match, mlqa (zh)", "F1, mlqa (zh)"} and "| mlqa (zh) |" in text
    edit(finished.folder, f"eval/{SET}.eval.json", metric="squad")
    front, text = write(finished.folder)
    names = {each["name"] for each in front["model-index"][0]["results"][0]["metrics"]}
    assert names == {"Exact Match", "F1"} and "| squad |" in text
