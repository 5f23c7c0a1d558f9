import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from kdfast import evaluate
from kdfast.models.save import list_checkpoints
from kdfast.training import assemble
from tests import corpora, readers
from tests.programs import log_of


def test_from_files_to_a_hugging_face_folder(world, capsys):
    assert world.run(eval_steps=3, save_steps=3, report_to="tensorboard") == 0
    out = world.output
    assert AutoModelForQuestionAnswering.from_pretrained(out).num_labels == 2
    assert AutoTokenizer.from_pretrained(out)("a b")["input_ids"]
    names = {path.name for path in out.iterdir()}
    assert {"best", "checkpoint-3", "checkpoint-6", "tensorboard", "run.json"} <= names
    record = json.loads((out / "run.json").read_text())
    assert record["config"]["train_batch_size"] == 8 and record["steps"] == 6
    assert record["versions"]["torch"] == torch.__version__ and record["hardware"]["cpu"]
    assert record["metrics"]["total"] == 10 and record["train_speed"]["windows_per_second"] > 0
    log = log_of(out)
    assert [line["step"] for line in log if "step" in line] == list(range(6))
    assert [line["evaluated_after"] for line in log if "evaluated_after" in line] == [3, 6]
    steps = [line for line in log if "step" in line]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert "temperature: 1.5" in capsys.readouterr().out

    # The whole of the second run's preparation comes from the cache.
    assert world.run(output_dir=world.path / "again") == 0
    assert "Teacher logits: cache" in capsys.readouterr().out
    assert [line for line in log_of(world.path / "again") if "step" in line] == steps


def test_evaluate_gives_the_figures_of_the_run(world, capsys):
    assert world.run() == 0
    capsys.readouterr()
    folder = world.path / "eval"
    arguments = ["--cache_dir", str(world.path / "cache"), "--output_dir", str(folder)]
    data = ["--data", world.validation_file, *arguments]
    # Nothing is said of windows: they are those of the run.
    assert evaluate.main(["--model", str(world.output), *data]) == 0
    printed = json.loads(capsys.readouterr().out)
    run = json.loads((world.output / "run.json").read_text())
    assert run["config"]["max_seq_length"] == 200
    assert printed == {"metric": "squad"} | run["metrics"]
    assert printed == json.loads((folder / "metrics.json").read_text())
    for name in ("predictions", "nbest_predictions", "null_odds"):
        assert len(json.loads((folder / f"{name}.json").read_text())) == 10

    files = ["--predictions", str(folder / "predictions.json")]
    odds = ["--null_odds", str(folder / "null_odds.json"), "--null_threshold", "0"]
    assert evaluate.main([*files, *odds, "--data", world.validation_file]) == 0
    scored = json.loads(capsys.readouterr().out)
    for name in ("exact", "f1", "HasAns_f1", "NoAns_exact"):
        assert scored[name] == printed[name]
    assert evaluate.main([*files, "--data", world.validation_file]) == 0
    assert "best_f1" not in json.loads(capsys.readouterr().out)


def test_a_threshold_turns_answers_into_none(world, capsys):
    data = ["--data", world.validation_file, "--cache_dir", str(world.path / "cache")]
    found = {}
    for threshold in ("-1e9", "0", "1e9"):
        model = ["--model", world.student, "--max_seq_length", "200"]
        evaluate.main([*model, *data, f"--null_threshold={threshold}"])
        found[threshold] = json.loads(capsys.readouterr().out)
    assert found["-1e9"]["exact"] == 50.0 and found["-1e9"]["HasAns_exact"] == 0.0
    # A guess such as "." is no answer, once its punctuation is gone.
    assert found["1e9"]["NoAns_exact"] < 50.0


def test_students_of_some_layers_and_the_undistilled_baseline(world, capsys):
    changes = {"student": None, "student_layers": "0,3"}
    assert world.run(**changes) == 0
    distilled = json.loads((world.output / "config.json").read_text())
    assert distilled["num_hidden_layers"] == 2
    plain = world.path / "plain"
    assert f"The student is in {world.output}" in capsys.readouterr().out
    assert world.run(**changes, output_dir=plain, distillation_loss_weight=0, report=True) == 0
    said = capsys.readouterr()
    assert f"The model is in {plain}" in said.out and "The model answers" in said.out
    assert not re.search("student (is|and)|teacher answer", said.out, re.I)
    # The evaluation for the report prints no figures between the lines of the run.
    assert '"exact"' not in said.out + said.err
    for page in ("README.md", "report.html"):
        assert "not distilled" in (plain / page).read_text()
    steps = [line for line in log_of(plain) if "step" in line]
    assert all(line["soft"] == 0 for line in steps)
    assert all(line["loss"] == pytest.approx(line["hard"]) for line in steps)


def test_a_resumed_run_ends_as_the_uninterrupted_one(world, capsys):
    assert world.run(save_steps=2, save_total_limit=5, eval_steps=2) == 0
    cut = world.path / "cut"
    shutil.copytree(world.output, cut)
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(cut / name)
    flags = {"output_dir": cut, "save_steps": 2, "eval_steps": 2, "save_total_limit": 5}
    assert world.run(**flags, resume_from_checkpoint="last") == 0
    assert "after step 2" in capsys.readouterr().out
    whole, resumed = (load_file(d / "model.safetensors") for d in (world.output, cut))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert log_of(cut) == log_of(world.output)
    # A complete run, resumed, is what it was, but for a checkpoint that its end did not delete.
    flags["save_total_limit"] = 2
    assert world.run(**flags, resume_from_checkpoint="last") == 0
    assert [path.name for path in list_checkpoints(cut)] == ["checkpoint-4", "checkpoint-6"]
    assert log_of(cut) == log_of(world.output)
    assert json.loads((cut / "run.json").read_text())["metrics"]["total"] == 10


def test_the_best_model_can_change_places_with_the_last(world):
    assert world.run(eval_steps=1, load_best_model_at_end=True) == 0
    evaluations = [line for line in log_of(world.output) if "evaluated_after" in line]
    best, top, last = (
        load_file(world.output / part / "model.safetensors") for part in ("best", ".", "last")
    )
    name = "qa_outputs.weight"
    assert torch.equal(best[name], top[name])
    scores = [line["f1"] for line in evaluations]
    assert torch.equal(top[name], last[name]) == (scores[-1] > max(scores[:-1]))


def test_unlabelled_questions_are_distilled(world, capsys):
    source = corpora.write(world.path / "bare.json", 20, labelled=False)
    assert world.run(train_file=source) == 0
    assert "20 of 40 questions have no answers: no gold label" in capsys.readouterr().out
    assert (
        world.run(
            train_file=source,
            output_dir=world.path / "plain",
            distillation_loss_weight=0,
            teacher=None,
        )
        == 0
    )
    assert "20 unlabelled windows are left out" in capsys.readouterr().out


def test_overwrite_deletes_an_earlier_run_and_nothing_else(world, capsys):
    assert world.run(save_steps=1, max_steps=2) == 0
    (world.output / "notes.txt").write_text("mine")
    assert world.run() == 2
    assert "is not empty" in capsys.readouterr().err
    assert world.run(overwrite=True, validation_file=None) == 0
    names = {path.name for path in world.output.iterdir()}
    assert "notes.txt" in names and not names & {"best", "checkpoint-1", "checkpoint-2"}
    foreign = world.path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    assert world.run(output_dir=foreign, overwrite=True) == 2
    assert "something else" in capsys.readouterr().err
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]


def test_a_student_without_a_head_gets_a_new_one(world, capsys):
    other = readers.save(world.path / "other", head=False)
    assert world.run(student=other) == 0
    assert "a new one is drawn" in capsys.readouterr().out


def test_a_resumed_run_must_be_the_same(world, capsys):
    assert world.run(save_steps=2) == 0
    assert world.run(save_steps=2, resume_from_checkpoint="last", temperature=2.0) == 2
    assert "temperature (1.5 -> 2.0)" in capsys.readouterr().err
    other = corpora.write(world.path / "other.json", 21)
    shutil.copy(other, world.train_file)
    assert world.run(save_steps=2, resume_from_checkpoint="last") == 2
    assert "differ: training data, teacher's logits." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["covidqa_long_dev.json", "xquad_zh.json", "squad2_dev.json"])
def test_real_files(world, name):
    """One article of each: thousands of words in a context, no spaces, unanswerable questions."""
    data = json.loads(corpora.shared(name).read_text(encoding="utf-8"))
    article = data["data"][0]
    article["paragraphs"] = article["paragraphs"][:3]
    source = world.path / name
    source.write_text(json.dumps({"data": [article]}), encoding="utf-8")
    changes = {"train_file": source, "validation_file": source, "max_steps": 1}
    assert world.run(**changes, doc_stride=100, max_seq_length=300) == 0
    questions = sum(len(paragraph["qas"]) for paragraph in article["paragraphs"])
    record = json.loads((world.output / "run.json").read_text())
    assert record["metrics"]["total"] == questions > 3
    assert record["train_windows"] > (20 * questions if "covid" in name else questions)


def test_a_run_that_finds_no_best_model_makes_one(world):
    assert world.run(save_steps=2, eval_steps=2) == 0
    shutil.rmtree(world.output / "best")
    flags = {"resume_from_checkpoint": "last", "load_best_model_at_end": True}
    assert world.run(save_steps=2, eval_steps=2, **flags) == 0
    names = {path.name for path in world.output.iterdir()}
    assert {"best", "last", "model.safetensors"} <= names


def test_a_budget_that_memory_halved_is_kept(world, monkeypatch, capsys):
    load = assemble.Training.load

    def little_memory(self, *arguments):
        if self.cuts.policy.max_tokens > 300:
            raise MemoryError
        return load(self, *arguments)

    monkeypatch.setattr(assemble.Training, "load", little_memory)
    flags = {"max_steps": 4, "save_steps": 2}
    assert world.run(**flags) == 0
    assert "Out of memory: steps are now cut by" in capsys.readouterr().out
    halved = json.loads((world.output / "run.json").read_text())["cuts"]["max_tokens"]
    assert halved <= 300
    monkeypatch.undo()
    shutil.rmtree(world.output / "checkpoint-4")
    assert world.run(**flags, resume_from_checkpoint="last") == 0
    assert json.loads((world.output / "run.json").read_text())["cuts"]["max_tokens"] == halved


def test_dropout_on_a_cpu_is_the_cheap_one(world, monkeypatch):
    made = []
    monkeypatch.setattr(assemble, "speed_up_dropout", made.append)
    assert world.run(max_steps=1) == 0
    assert len(made) == (not torch.cuda.is_available())


def test_the_best_model_by_the_rule_of_a_benchmark(world, capsys):
    flags = {"eval_steps": 1, "max_steps": 2, "metric": "korquad"}
    assert world.run(**flags) == 0
    said = capsys.readouterr().out
    assert "Scored by KorQuAD's rule (F1 over characters)." in said
    run = json.loads((world.output / "run.json").read_text())
    scores = [line["f1"] for line in log_of(world.output) if "evaluated_after" in line]
    assert run["metric"] == "korquad" and run["best_f1"] == max(scores)
    assert "scored by korquad" in (world.output / "README.md").read_text()
    data = ["--data", world.validation_file, "--cache_dir", str(world.path / "cache")]
    data += ["--model", str(world.output / "best")]
    found = {}
    for metric in ("korquad", "squad"):
        assert evaluate.main([*data, "--metric", metric]) == 0
        found[metric] = json.loads(capsys.readouterr().out)["f1"]
    assert found["korquad"] == pytest.approx(max(scores)) != found["squad"]

    other = {"output_dir": world.path / "other", "max_steps": 1}
    assert world.run(**other, metric="mlqa", language="de") == 0
    run = json.loads((world.path / "other" / "run.json").read_text())
    assert (run["metric"], run["language"]) == ("mlqa", "de")
    assert "mlqa (de)" in (world.path / "other" / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"metric": "mlqa"}, "give --language, one of ar"),
        ({"metric": "mlqa", "language": "ja"}, "none for ja"),
        ({"metric": "cmrc", "validation_file": None}, "--metric needs --validation_file"),
        ({"metric": "mlqa", "stage": "both"}, "give --language, one of ar"),
    ],
)
def test_a_rule_that_does_not_go(world, capsys, flags, words):
    assert world.run(**flags) == 2
    assert words in capsys.readouterr().err and not world.output.exists()
