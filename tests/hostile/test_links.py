"""Folders that somebody sent: no program writes through their links, nor waits for their pipes."""

import json
import os
import shutil
from pathlib import Path

import pytest

from kdfast import card, evaluate, predict
from kdfast.common.errors import UserError
from kdfast.models.load import load_reader
from kdfast.teachers.cache import HEADER, PROGRESS_FILE


def seen(folder):
    """All that is below a folder, with the content of the files."""
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def mine(tmp_path):
    """A folder of the user's own that no program may change."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("figures.png", "a.yaml", "precious.json"):
        (folder / name).write_text("mine")
    before = seen(folder)
    yield folder
    assert seen(folder) == before


def evaluate_flags(world, output):
    return [
        *("--model", str(world.output), "--data", world.validation_file),
        *("--max_seq_length", "200", "--cache_dir", str(world.path / "cache")),
        *("--output_dir", str(output)),
    ]


def test_card_evaluate_and_predict(world, mine, monkeypatch, capsys):
    assert world.run(max_steps=1) == 0
    run, sent = world.output, world.path / "sent"
    assert evaluate.main(evaluate_flags(world, run / "eval")) == 0
    made = card.main(["--model_dir", str(run)])
    assert made == 0
    shutil.copytree(run, sent)

    def refuses(main, flags, name):
        capsys.readouterr()
        assert main(flags) == 2, name
        assert f"{name} is a link" in capsys.readouterr().err
        shutil.rmtree(run)
        shutil.copytree(sent, run)

    for name in ("figures", ".eval_results", "README.md", "card.json", "report.html"):
        is_folder = name in ("figures", ".eval_results")
        if (run / name).is_dir():
            shutil.rmtree(run / name)
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(mine if is_folder else mine / "precious.json")
        report = ["--report"] if name == "report.html" else []
        refuses(card.main, ["--model_dir", str(run), *report], name)
    # Temporary names are taken away, and not followed.
    for name in (".README.md.new", ".card.json.new"):
        (run / name).symlink_to(mine / "precious.json")
    os.mkfifo(run / ".report.html.new")
    assert card.main(["--model_dir", str(run), "--report"]) == 0

    shutil.rmtree(run / "eval")
    (run / "eval").symlink_to(mine)
    refuses(evaluate.main, evaluate_flags(world, run / "eval"), "eval")
    (run / "eval" / "metrics.json").unlink()
    (run / "eval" / "metrics.json").symlink_to(mine / "precious.json")
    refuses(evaluate.main, evaluate_flags(world, run / "eval"), "metrics.json")

    asked = ["--model", str(run), "--question", "Who?", "--context", "It was me."]
    (run / "answers.part").symlink_to(mine / "precious.json")
    assert predict.main([*asked, "--output", str(run / "answers")]) == 0
    (run / "answers").unlink()
    (run / "answers").symlink_to(mine / "precious.json")
    refuses(predict.main, [*asked, "--output", str(run / "answers")], "answers")


def test_names_in_result_files_are_no_paths(world, mine, capsys):
    assert world.run(max_steps=1) == 0
    assert evaluate.main(evaluate_flags(world, world.output / "eval")) == 0
    (result,) = (world.output / "eval").glob("*.eval.json")
    record = json.loads(result.read_text())
    record |= {"name": "../../mine/a", "file": None, "dataset": "some/set"}
    result.with_name("other.eval.json").write_text(json.dumps(record))
    # run.json names the cache that the run had on another machine.
    run = json.loads((world.output / "run.json").read_text())
    run["config"]["cache_dir"] = str(mine)
    (world.output / "run.json").write_text(json.dumps(run))
    cache = ["--cache_dir", str(world.path / "cache")]
    assert card.main(["--model_dir", str(world.output), "--report", *cache]) == 0
    assert "names itself by a path" in capsys.readouterr().out


def test_a_cache_with_links(world, mine, capsys):
    cache = world.path / "cache"
    assert world.run(max_steps=1) == 0
    (pass_,) = (path for path in (cache / "teacher").iterdir() if path.is_dir())
    features = [path for path in (cache / "features").iterdir() if path.is_dir()]

    def refused(name):
        assert world.run(max_steps=1, overwrite=True) == 2
        assert f"{name} is a link" in capsys.readouterr().err

    partial = pass_.rename(pass_.with_name(f"{pass_.name}.partial"))
    (mine / PROGRESS_FILE).write_bytes(b"\0")
    (partial / PROGRESS_FILE).symlink_to(mine / PROGRESS_FILE)  # which says that nothing is done
    assert world.run(max_steps=1, overwrite=True) == 0
    (mine / PROGRESS_FILE).unlink()
    pass_.rename(partial)
    partial.rename(cache / "kept")
    partial.symlink_to(cache / "kept")
    refused(partial.name)
    for name in ("teacher", "features"):
        shutil.rmtree(cache / name)
        (cache / name).symlink_to(mine)
        refused(name)
    assert len(features) == 2
    (cache / "features").unlink()
    (cache / "features").mkdir()
    for path in features:
        path.with_name(f"{path.name}.partial").symlink_to(mine)
        os.mkfifo(path.with_name(f".{path.name}.new"))
    assert world.run(max_steps=1, overwrite=True) == 2
    (cache / "teacher").unlink()
    assert world.run(max_steps=1, overwrite=True) == 0


def test_a_pipe_in_a_cache_is_not_waited_for(world, capsys):
    assert world.run(max_steps=1) == 0
    for name in ("input_ids.npy", HEADER, "SHA256SUMS"):
        (folder, *_) = sorted(
            path for path in (world.path / "cache/features").glob("*") if path.is_dir()
        )
        kept = (folder / name).rename(world.path / "kept")
        os.mkfifo(folder / name)
        assert world.run(max_steps=1, overwrite=True) == 2
        assert "damaged cache" in capsys.readouterr().err
        (folder / name).unlink()
        kept.rename(folder / name)


def test_a_model_names_no_file_elsewhere(world):
    folder = Path(world.student)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../teacher/model.safetensors"}}))
    with pytest.raises(UserError, match="which is no file's name"):
        load_reader(str(folder), "--student")
    index.unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "../teacher"}')
    with pytest.raises(UserError, match="holds an adapter"):
        load_reader(str(folder), "--student")


def test_a_cache_or_an_output_folder_may_be_a_link(world):
    for name in ("cache", "out"):
        (world.path / f"big-{name}").mkdir()
        (world.path / name).symlink_to(world.path / f"big-{name}")
    assert world.run(max_steps=1) == 0
    assert (world.path / "big-out" / "run.json").is_file()
    assert any((world.path / "big-cache" / "features").iterdir())
