"""Weights in pytorch_model.bin alone: found converted on the hub, or converted by kdfast.doctor."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdfast import doctor
from kdfast.common.errors import UserError
from kdfast.models import conversion, load
from tests import hub
from tests.hostile.mutations import Bomb

pytestmark = pytest.mark.program

GOLDEN = Path(__file__).parents[1] / "golden"
PICKLED = GOLDEN / "pickled"  # written by transformers 4.57.6
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A model whose weights are pickled, whole or in parts."""

    def make(kind="whole", name="it"):
        made = shutil.copytree(GOLDEN / "roberta", tmp_path / name)
        (made / WEIGHTS).unlink()
        for path in (PICKLED / kind).iterdir():
            shutil.copy(path, made)
        return made

    return make


def refused(arguments, capsys):
    assert doctor.main([str(each) for each in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("kind", ["whole", "parts"])
def test_a_folder_gets_safetensors_next_to_its_pickle(folder, capsys, kind):
    made = folder(kind)
    with pytest.raises(UserError, match=f"doctor --convert {made} makes model.safetensors"):
        load.load_reader(str(made), "--student")
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    assert doctor.main(["--convert", str(made)]) == 0
    assert capsys.readouterr().out == f"{made / WEIGHTS} is written.\n"
    ours, theirs = load_file(made / WEIGHTS), load_file(GOLDEN / "roberta" / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].half()) for name in theirs)
    after = {path.name: path.read_bytes() for path in made.iterdir()}
    assert after.pop(WEIGHTS) and after == before
    mode = stat.S_IMODE((made / WEIGHTS).stat().st_mode)
    (made / "new").touch()
    assert mode == stat.S_IMODE((made / "new").stat().st_mode)
    load.load_reader(str(made), "--student")
    assert "in safetensors already" in refused(["--convert", made], capsys)


def test_weights_that_are_not_finite_are_not_converted(folder, capsys):
    made = folder()
    weights = torch.load(made / "pytorch_model.bin", weights_only=True)
    next(iter(weights.values()))[3] = torch.nan
    torch.save(weights, made / "pytorch_model.bin")
    said = refused(["--convert", made], capsys)
    assert f"holds weights that are not finite ({next(iter(weights))})" in said
    assert not (made / WEIGHTS).exists()


def test_a_new_folder_gets_the_whole_model(folder, tmp_path, capsys):
    made, target = folder("parts"), tmp_path / "target"
    assert doctor.main(["--convert", str(made), "--output_dir", str(target)]) == 0
    load.load_reader(str(target), "--student")
    assert {path.name for path in target.iterdir()} == {
        *(path.name for path in (GOLDEN / "roberta").iterdir())
    }
    (target / "config.json").write_text("mine")
    assert "is there already" in refused(["--convert", made, "--output_dir", target], capsys)
    assert (target / "config.json").read_text() == "mine"


def test_tied_weights_and_other_heads_are_kept(folder):
    made = folder()
    state = torch.load(made / "pytorch_model.bin", weights_only=True)
    table = state["roberta.embeddings.word_embeddings.weight"]
    state |= {"lm_head.decoder.weight": table, "lm_head.part": table[:3], "turned": table.T}
    torch.save(state, made / "pytorch_model.bin")
    conversion.convert(str(made))
    found = load_file(made / WEIGHTS)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    load.load_reader(str(made), "--student")


# Both formats of torch.save.
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_that_would_run_code_is_refused(folder, tmp_path, capsys, is_zip):
    made, marker = folder(), tmp_path / "ran"
    path = made / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "bomb": Bomb(marker)}, path, _use_new_zipfile_serialization=is_zip)
    error = refused(["--convert", made], capsys)
    assert f"{path} holds more than weights" in error
    assert not marker.exists() and not (made / WEIGHTS).exists()
    assert not [each for each in made.iterdir() if each.name.startswith(".")]
    torch.load(path, weights_only=False)
    assert marker.exists()  # so it would have gone off


@pytest.mark.sample(3)
@pytest.mark.parametrize("content", [None, b"no pickle", b""], ids=["half", "text", "empty"])
def test_a_file_that_is_damaged_is_refused(folder, capsys, content):
    path = folder() / "pytorch_model.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    error = refused(["--convert", path.parent], capsys)
    assert "or a damaged one, and was not read" in error


@pytest.mark.sample(4)
@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], {1: torch.ones(1)}, {"a": 1}])
def test_a_file_of_something_else_is_refused(folder, capsys, content):
    path = folder() / "pytorch_model.bin"
    torch.save(content, path)
    error = refused(["--convert", path.parent], capsys)
    assert "something else than a model's weights" in error


def test_faults_are_one_sentence(folder, tmp_path, capsys, monkeypatch):
    path = folder() / "pytorch_model.bin"
    made = path.parent
    torch.save({}, path)
    assert "holds no weights" in refused(["--convert", made], capsys)
    path.unlink()
    assert "holds no pytorch_model.bin" in refused(["--convert", made], capsys)
    parts = folder("parts", "parts")
    index = json.loads((parts / conversion.INDEX).read_text())
    index["weight_map"]["x"] = "../../escape.bin"
    (parts / conversion.INDEX).write_text(json.dumps(index))
    assert "holds no escape.bin" in refused(["--convert", parts], capsys)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "neither a folder nor a model" in refused(["--convert", "nobody/has-this"], capsys)
    assert "--output_dir needs --convert" in refused(["--output_dir", tmp_path], capsys)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    assert conversion.main([str(tmp_path / "out"), str(path)]) == 2
    assert "torch 2.5.1+cpu reads no pickle safely" in capsys.readouterr().err


def python(code, url, home, **more):
    env = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        **more,
    }
    env["HF_HUB_OFFLINE"] = more.get("HF_HUB_OFFLINE", "0")
    env["PYTHONPATH"] = str(GOLDEN.parents[1])
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, timeout=120)


LOAD = """
from kdfast.models import load
loaded = load.load_reader("me/it", "--student")
print(load.local_folder("me/it", "--student"))
"""
CONVERT = "from kdfast import doctor; raise SystemExit(doctor.main(['--convert', 'me/it']))"


def test_a_hub_model_is_read_as_the_hubs_bot_has_converted_it(folder, tmp_path):
    main = folder()
    converted = shutil.copytree(main, tmp_path / "converted")
    shutil.copy(GOLDEN / "roberta" / WEIGHTS, converted)
    wrong = shutil.copytree(converted, tmp_path / "wrong")
    (wrong / "pytorch_model.bin").write_bytes(b"weights of an earlier day")
    (wrong / WEIGHTS).write_bytes(b"and what was made of them")
    repo = {"main": main, "refs/pr/2": wrong, "refs/pr/3": converted, "refs/pr/4": wrong}
    requests = [hub.pull_request(2), hub.pull_request(4, author="mallory")]
    home = tmp_path / "home"
    home.mkdir()
    with hub.served({"me/it": repo}, {"me/it": [*requests, hub.pull_request(3)]}) as (url, asked):
        done = python(LOAD, url, home)
        assert done.returncode == 0, done.stderr
        read = Path(done.stdout.strip())
        assert (read / WEIGHTS).read_bytes() == (converted / WEIGHTS).read_bytes()
        assert not any(".bin" in path or "refs/pr/4" in path for path in asked)
    # And again without the hub.
    again = python(LOAD, url, home, HF_HUB_OFFLINE="1")
    assert again.stdout == done.stdout, again.stderr


def test_a_hub_model_without_a_conversion_names_the_command(folder, tmp_path):
    main = folder()
    other = shutil.copytree(main, tmp_path / "other")
    shutil.copy(GOLDEN / "roberta" / WEIGHTS, other)
    home = tmp_path / "home"
    home.mkdir()
    requests = [hub.pull_request(5, author="mallory"), hub.pull_request(5, title="Add weights")]
    for listed in ([], requests, [hub.pull_request(5, status="closed")]):
        repo = {"main": main, "refs/pr/5": other}
        with hub.served({"me/it": repo}, {"me/it": listed}) as (url, asked):
            done = python(LOAD, url, home)
            assert "python -m kdfast.doctor --convert me/it makes a folder" in done.stderr
            assert not any("refs/pr/5" in path for path in asked)
    with hub.served({"me/it": {"main": main}}) as (url, _):
        done = python(CONVERT, url, home)
        assert done.returncode == 0 and done.stdout == "it/model.safetensors is written.\n"
        load.load_reader(str(home / "it"), "--student")
        done = python(CONVERT, url, home)
        assert done.returncode == 2 and "--output_dir it is there already" in done.stderr
