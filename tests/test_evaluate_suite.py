"""`kdfast.evaluate` on sets of a suite, which local files stand in for."""

import json
import shutil
import sys
import types
from pathlib import Path

import datasets
import pytest
import torch

from kdfast import evaluate
from kdfast.common.files import sha256_of, write_json
from kdfast.evaluation import evaluated_model, scoring
from kdfast.models.load import load_reader
from tests import corpora, forks, readers


@pytest.fixture
def world(tmp_path, capfd):
    """Two tiny readers, data, and `run(*flags)`: the program's status, output and errors."""
    plain = corpora.write(tmp_path / "plain.json", 6)
    perturbed = json.loads(Path(plain).read_text())
    for article in perturbed["data"]:
        paragraph = article["paragraphs"][0]
        asked = paragraph["qas"].pop()  # the question without an answer
        answered = paragraph["qas"][0]
        added = f"{paragraph['context']} The leader of Utopia was {asked['id']}."
        form = answered | {"id": f"{answered['id']}-high-conf-turk2"}
        article["paragraphs"].append({"context": added, "qas": [form]})
    (tmp_path / "perturbed.json").write_text(json.dumps(perturbed))
    folders = types.SimpleNamespace(
        path=tmp_path,
        output=tmp_path / "eval",
        first=readers.save(tmp_path / "first", seed=1),
        second=readers.save(tmp_path / "second", "roberta", seed=2),
        plain=plain,
        perturbed=str(tmp_path / "perturbed.json"),
    )
    folders.both = [
        *("--suite", "squad_v2", "squad_adversarial"),
        *("--data", f"squad_v2={folders.plain}", f"squad_adversarial={folders.perturbed}"),
    ]

    def run(*flags, model=folders.first):
        options = ["--model", model, "--cache_dir", str(tmp_path / "cache")]
        options += ["--max_seq_length", "200", *map(str, flags)]
        return evaluate.main(options), *capfd.readouterr()

    folders.run = run
    return folders


def read(world, name):
    return json.loads((world.output / f"{name}.json").read_text())


def test_a_suite_of_two_readers(world):
    status, out, err = world.run(
        *world.both, "--compare", world.second, "--output_dir", world.output
    )
    assert status == 0, err
    summary = read(world, "summary")
    squad, adversarial = summary["sets"]
    assert {path.name for path in world.output.iterdir()} == {
        "summary.json",
        *(
            f"{each['name']}.{end}.json"
            for each in summary["sets"]
            for end in ("eval", "questions")
        ),
    }
    header = {name: value for name, value in summary.items() if name != "sets"}
    for record in (squad, adversarial):
        sum_of = {"questions_sha256": sha256_of(world.output / f"{record['name']}.questions.json")}
        assert read(world, f"{record['name']}.eval") == header | sum_of | record
    model, other = header["model"], header["compared_with"]
    assert (model["type"], other["type"]) == ("bert", "roberta")
    assert model["weights_sha256"] != other["weights_sha256"] and model["parameters"] > 0
    assert 0 < model["latency"]["median_ms"] <= model["latency"]["p80_ms"]
    assert header["versions"]["torch"] and header["settings"]["doc_stride"] == 128

    assert (squad["dataset"], squad["file"]) == ("rajpurkar/squad_v2", world.plain)
    assert (squad["null_threshold"], adversarial["null_threshold"]) == (0.0, None)
    assert squad["metrics"]["total"] == adversarial["metrics"]["total"] == 12
    assert "worst_forms" not in squad and adversarial["worst_forms"]["metrics"]["total"] == 6
    assert adversarial["worst_forms"]["metrics"]["f1"] <= adversarial["metrics"]["f1"]
    low, high = squad["intervals"]["NoAns_f1"]
    assert 0 <= low <= squad["metrics"]["NoAns_f1"] <= high <= 100

    for each in (squad, adversarial):
        compared = each["compared"]
        lines = read(world, f"{each['name']}.questions")
        assert len(lines) == each["windows"] == 12
        own = [line["f1"] for line in lines.values()]
        others = [line["compared"]["f1"] for line in lines.values()]
        assert 100 * sum(own) / 12 == pytest.approx(each["metrics"]["f1"])
        assert 100 * sum(others) / 12 == pytest.approx(compared["metrics"]["f1"])
        difference = compared["difference"]["f1"]
        assert difference["mean"] == pytest.approx(100 * (sum(own) - sum(others)) / 12)
        assert difference["better"] == sum(a > b for a, b in zip(own, others, strict=True))
        assert f"| {each['name']} | 12 | {each['metrics']['exact']:.2f} [" in out
    answers = [line["answer"] for line in read(world, "squad_adversarial.questions").values()]
    assert all(answers)  # nobody abstains where every question has an answer
    assert "squad_v2: exact" in err and "windows/s" in err


def test_a_file_of_ones_own_is_written_like_a_set(world):
    data = ["--data", world.plain]
    status, out, _ = world.run(*data, "--output_dir", world.output)
    assert status == 0
    metrics = json.loads(out)
    own = read(world, "plain.eval")
    assert {"metric": "squad"} | own["metrics"] == metrics == read(world, "metrics")
    assert (own["dataset"], own["file"], own["language"]) == (None, world.plain, None)
    assert read(world, "summary")["sets"][0]["metrics"] == own["metrics"]
    questions = read(world, "plain.questions")
    assert {key: line["answer"] for key, line in questions.items()} == read(world, "predictions")
    status, out, err = world.run(*data, "--compare", world.second)
    assert status == 0 and json.loads(out) == metrics and "| plain | " in err


def test_a_threshold_of_other_data(world):
    data = ["--data", world.plain]
    world.run("--data", world.perturbed, "--null_threshold", 1e9, "--output_dir", world.output)
    fitted = read(world, "metrics")
    assert fitted["best_f1"] > 0  # where every question has an answer, none is worth abstaining
    out = ["--output_dir", world.path / "fitted"]
    from_data = world.run(*data, "--null_threshold_from", world.perturbed, *out)
    used = json.loads((world.path / "fitted" / "plain.eval.json").read_text())["null_threshold"]
    assert used == fitted["best_f1_thresh"] != 0
    given = world.run(*data, "--null_threshold", fitted["best_f1_thresh"])
    assert from_data[0] == given[0] == 0 and from_data[1] == given[1]
    for name in ("metrics", "perturbed.eval"):
        of_result = ["--null_threshold_from", world.output / f"{name}.json"]
        assert world.run(*data, *of_result)[1] == given[1]

    status, _, err = world.run(*data, *of_result, "--compare", world.second)
    assert status == 2 and "each gets its own threshold" in err
    summary = ["--null_threshold_from", world.output / "summary.json"]
    status, _, err = world.run(*data, *summary)
    assert status == 2 and "give the result of one set" in err


def test_the_rule_of_a_threshold_is_that_of_the_figures(world, monkeypatch):
    """Both where the other data are answered, and where a result holds the threshold."""
    used = {}
    for metric in ("squad", "korquad"):
        by = ["--metric", metric, "--output_dir", world.path / metric]
        assert world.run("--data", world.perturbed, "--null_threshold", 1e9, *by)[0] == 0
        used[metric] = json.loads((world.path / metric / "metrics.json").read_text())
    assert used["squad"]["best_f1_thresh"] != used["korquad"]["best_f1_thresh"]

    # A set whose own rule is another than that of the other data.
    monkeypatch.chdir(world.path)
    (world.path / "KorQuAD").mkdir()
    own = shutil.copy(world.plain, world.path / "KorQuAD" / "squad_kor_v1")
    data = ["--data", own.relative_to(world.path), "--output_dir", world.output]
    status, _, err = world.run(*data, "--null_threshold_from", world.perturbed)
    assert status == 0, err
    record = read(world, "squad_kor_v1.eval")
    assert record["metric"] == "korquad"
    assert record["null_threshold"] == used["korquad"]["best_f1_thresh"]

    for name in ("metrics", "perturbed.eval"):
        of = {metric: world.path / metric / f"{name}.json" for metric in used}
        assert world.run(*data, "--null_threshold_from", of["korquad"])[0] == 0
        status, out, err = world.run(*data, "--null_threshold_from", of["squad"])
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "is scored by squad, and this evaluation by korquad" in err


def test_no_threshold_where_silence_is_best(world):
    silent = {"best_f1": 50.0, "best_f1_thresh": 0.0, "NoAns_total": 6, "total": 12}
    (world.path / "silent.json").write_text(json.dumps(silent))
    flags = ["--data", world.plain, "--null_threshold_from", world.path / "silent.json"]
    status, _, err = world.run(*flags)
    assert status == 2 and "does best there by answering nothing" in err


def test_no_network(world, monkeypatch):
    def unreachable(*place, **options):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    status, out, err = world.run("--suite", "card", "--data", f"squad_v2={world.plain}")
    assert status == 2 and not out
    assert "Set squad: 'rajpurkar/squad:plain_text:validation'" in err
    assert "Couldn't reach" in err and "--data squad=FILE" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--suite", "crad"], "did you mean card?"),
        (["--suite", "card", "--data", "x.json"], "NAME=FILE"),
        (["--data", "a.json", "b.json"], "--data names several"),
        (["--data", "a", "--null_threshold", "1", "--null_threshold_from", "b"], "exclude"),
        (["--data", "a.json", "--compare", "/nowhere"], "--compare /nowhere"),
    ],
)
def test_faults(world, flags, words):
    status, out, err = world.run(*flags)
    assert status == 2 and not out and words in err and err.count("\n") == 1


def test_a_local_file_that_is_not_there(world):
    status, _, err = world.run("--suite", "squad", "--data", "squad=/nowhere.json")
    assert status == 2 and "no such file" in err and "takes a copy" not in err


def test_flags_of_a_model_without_one(capsys):
    for name in ("suite", "compare", "null_threshold_from"):
        assert evaluate.main(["--predictions", "p", "--data", "d", f"--{name}", "card"]) == 2
        assert f"--{name} goes with --model" in capsys.readouterr().err


def test_a_model_without_a_head(world):
    headless = readers.save(world.path / "headless", head=False)
    status, _, err = world.run(*world.both, model=headless)
    assert status == 2 and "has no question-answering head" in err
    status, _, err = world.run(*world.both, "--compare", headless)
    assert status == 2 and "--compare" in err and "has no question-answering head" in err


def test_two_ranks_print_and_write_once(world):
    flags = [*world.both, "--compare", world.second, "--max_seq_length", "200"]
    flags += ["--model", world.first, "--cache_dir", str(world.path / "cache")]
    flags += ["--max_query_length", "4"]  # so that there is something to say of the questions
    said = [world.path / f"said{number}" for number in range(2)]
    forward, read_here = scoring.forward_windows, []

    def counted(model, windows, batches, *rest):
        read_here.append(sum(map(len, batches)))
        return forward(model, windows, batches, *rest)

    def rank(number):
        scoring.forward_windows = counted
        scoring.forward_tokens = lambda *given: 400
        sys.stdout = sys.stderr = said[number].open("w")
        status = evaluate.main([*flags, "--output_dir", str(world.path / "ranks")])
        sys.stdout.close()
        return status, read_here

    (first, some), (second, others) = forks.run(2, rank)
    assert (first, second) == (0, 0)
    # Two sets, two readers: 12 windows each time, of which each rank reads its share.
    assert [sum(pair) for pair in zip(some, others, strict=True)] == [12] * 4
    assert min(some + others) > 0
    told = said[0].read_text()
    assert "are longer than --max_query_length" in told and "windows/s" in told
    assert said[1].read_text() == ""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have: another number rounds otherwise
    assert world.run(*flags, "--output_dir", world.output)[0] == 0
    torch.set_num_threads(threads)
    together = json.loads((world.path / "ranks" / "summary.json").read_text())
    assert together["ranks"] == 2
    for ours, alone in zip(together["sets"], read(world, "summary")["sets"], strict=True):
        assert ours["intervals"] == alone["intervals"]
        assert ours["compared"]["difference"] == alone["compared"]["difference"]
        assert ours["metrics"] == pytest.approx(alone["metrics"])


def test_the_rule_of_a_suite(world):
    flags = ["--suite", "mlqa.es", "jaquad", "xquad.es", "--output_dir", world.output]
    for name in ("mlqa.es", "jaquad", "xquad.es"):
        flags += ["--data", f"{name}={world.plain}"]
    status, out, err = world.run(*flags)
    assert status == 0, err
    sets = {each["name"]: each for each in read(world, "summary")["sets"]}
    assert {name: each["metric"] for name, each in sets.items()} == {
        "mlqa.es": "mlqa",
        "jaquad": "korquad",
        "xquad.es": "squad",
    }
    assert read(world, "jaquad.eval") | sets["jaquad"] == read(world, "jaquad.eval")
    assert "mlqa (es) |" in out and "korquad |" in out and "squad |" in out
    assert "Scored by KorQuAD's rule (F1 over characters)." in err
    # Figures of single questions are of the rule too, and make the sum.
    lines = read(world, "jaquad.questions").values()
    assert 100 * sum(each["f1"] for each in lines) / len(lines) == pytest.approx(
        sets["jaquad"]["metrics"]["f1"]
    )
    assert sets["jaquad"]["metrics"]["f1"] != sets["xquad.es"]["metrics"]["f1"]
    status, _, err = world.run("--suite", "xquad.el", "--metric", "mlqa")
    assert status == 2 and "none for el" in err
    status, _, err = world.run("--suite", "mlqa.es", "--metric", "mlqa", "--language", "es")
    assert status == 2 and "--language goes with --data" in err


def test_the_windows_that_a_model_was_trained_with(world):
    def used(*flags, model=world.first):
        flags = [*flags, "--model", model, "--cache_dir", world.path / "cache"]
        flags += ["--data", world.plain, "--output_dir", world.output]
        assert evaluate.main([str(each) for each in flags]) == 0
        settings = read(world, "summary")["settings"]
        return [settings[each] for each in ("max_seq_length", "max_query_length", "doc_stride")]

    assert used() == [384, 64, 128]
    trained = {"max_seq_length": 150, "max_query_length": 20, "doc_stride": 40}
    Path(world.first, "run.json").write_text(json.dumps({"config": trained}))
    assert used() == [150, 20, 40]
    assert used("--doc_stride", "60") == [150, 20, 60]
    shutil.copytree(world.first, world.path / "first" / "best")
    (world.path / "first" / "best" / "run.json").unlink()
    assert used(model=world.path / "first" / "best") == [150, 20, 40]
    (world.path / "first" / "run.json").write_text('{"config"')
    status, _, err = world.run("--data", world.plain)
    assert status == 2 and "run.json is damaged" in err
    Path(world.first, "run.json").write_text(json.dumps({"config": trained}))
    # What was not given gives way to what the model reads, and to flags.
    short = readers.save(world.path / "short", max_position_embeddings=90)
    assert used(model=short) == [90, 64, 11]
    assert used("--max_seq_length", "100") == [100, 20, 40]
    trained["max_seq_length"] = "long"
    Path(short, "run.json").write_text(json.dumps({"config": trained}))
    status, _, err = world.run("--data", world.plain, model=short)
    assert status == 2 and "run.json is damaged" in err and "config.max_seq_length" in err
    Path(short, "run.json").write_text('{"model": 1}')  # of another program
    assert used(model=short) == [90, 64, 11]


def test_the_line_on_windows(world, capfd):
    Path(world.first, "run.json").write_text(json.dumps({"config": {"doc_stride": 40}}))
    status, _, err = world.run("--data", world.plain)
    assert status == 0 and err.count("max_seq_length 200  max_query_length 64  doc_stride 40") == 1
    assert f", as in {world.first}/run.json\n" in err
    short = readers.save(world.path / "short", max_position_embeddings=90)
    cache = ["--cache_dir", str(world.path / "cache")]
    assert evaluate.main(["--model", short, "--data", world.plain, *cache]) == 0
    assert "doc_stride 11, as it reads 90 tokens\n" in capfd.readouterr().err
    status, _, err = world.run("--data", world.plain, "--doc_stride", 128, model=world.second)
    assert status == 0 and "doc_stride" not in err


def test_a_reader_replaced_while_it_is_loaded_is_refused(world, monkeypatch):
    def replaced(name, role):
        loaded = load_reader(name, role)
        shutil.copy(Path(world.second, "model.safetensors"), name)
        return loaded

    monkeypatch.setattr(evaluated_model, "load_reader", replaced)
    status, _, err = world.run("--data", world.plain, "--output_dir", world.output)
    assert status == 2 and f"{world.first} was replaced while it was loaded" in err
    assert not list(world.output.glob("*.json"))


def test_answers_are_written_before_the_figures_that_name_their_sum(world, monkeypatch):
    """So a kill between the two leaves no figures with the answers of an earlier evaluation."""
    written = []

    def write(path, content):
        written.append(path.name)
        write_json(path, content)

    monkeypatch.setattr(evaluate, "write_json", write)
    assert world.run("--data", world.plain, "--output_dir", world.output)[0] == 0
    assert written[:2] == ["plain.questions.json", "plain.eval.json"]
    answers = sha256_of(world.output / "plain.questions.json")
    assert read(world, "plain.eval")["questions_sha256"] == answers
