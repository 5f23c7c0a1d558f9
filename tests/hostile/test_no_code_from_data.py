"""No data is run as code, and nothing is written outside the folders that a run was given."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.modeling_utils import PreTrainedModel

import kdfast
from kdfast import evaluate
from kdfast.common.errors import UserError
from kdfast.models import hub, load
from tests.hostile.mutations import Bomb

FORBIDDEN = (
    r"torch\.load\b",
    r"\b(pickle|marshal|shelve|dill|joblib|cloudpickle)\.\w",
    r"(from|import) (pickle|marshal|shelve|dill|joblib|cloudpickle)\b",
    r"trust_remote_code\s*=\s*(?!False)",
    r"allow_pickle\s*=\s*True",
    r"np\.load\((?!.*allow_pickle=False)",
    r"(?<![\w.])(eval|exec|compile|__import__)\((?!\))",
    r"yaml\.(unsafe_|full_)?load\(",
    r"(gather|broadcast|scatter|send|recv)_object(_list)?\(",  # torch.distributed's, which pickle
    r"weights_only\s*=\s*False",
    r"shell\s*=\s*True",
)


def code_of(path):
    """A file's lines without comments."""
    return re.sub(r"(?m)\s#.*$", "", path.read_text(encoding="utf-8"))


def found_in(text):
    return [pattern for pattern in FORBIDDEN if re.search(pattern, text)]


# The program that makes safetensors of a pickle, with weights_only.
CONVERTER = "models/conversion.py"


def test_the_package_calls_nothing_that_runs_data():
    package = Path(kdfast.__file__).parent
    found = {
        path.relative_to(package).as_posix(): found_in(code_of(path))
        for path in package.rglob("*.py")
    }
    assert len(found) > 40
    assert found.pop(CONVERTER) == [r"torch\.load\b"]
    text = code_of(package / CONVERTER)
    assert [len(re.findall(each, text)) for each in (r"torch\.load\(", "weights_only=True")] == [
        1,
        1,
    ]
    for name, patterns in found.items():
        assert not patterns, name


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "import pickle",
        "pickle.loads(x)",
        "trust_remote_code=True",
        "trust_remote_code = config.trust",
        "np.load(path)",
        "eval(text)",
        "yaml.load(text)",
        "dist.all_gather_object(found, x)",
        "dist.broadcast_object_list(x)",
    ],
)
def test_each_forbidden_call_is_seen(line):
    assert found_in(line)


@pytest.fixture
def trap(world):
    """The student's folder, in which every kind of code would leave a mark."""
    folder, marker = Path(world.student), world.path / "ran"
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    (folder / "evil.py").write_text(code + "class Evil: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        kinds = ("AutoConfig", "AutoModel", "AutoModelForQuestionAnswering")
        auto_map = dict.fromkeys(kinds, "evil.Evil") | {"AutoTokenizer": ["evil.Evil"] * 2}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": auto_map}))
    return world, folder, marker


def test_a_model_folder_with_code_and_pickled_weights_only_is_refused(trap, capsys):
    world, folder, marker = trap
    weights = load_file(folder / "model.safetensors")
    torch.save({**weights, "bomb": Bomb(marker)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert world.run() == 2
    assert "in safetensors" in capsys.readouterr().err
    assert not marker.exists()
    with (folder / "pytorch_model.bin").open("rb") as file, pytest.raises(Exception):  # noqa: B017
        torch.load(file, weights_only=True)
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()  # so it would have gone off


def test_pickled_weights_are_refused_even_if_harmless(world, capsys):
    folder = Path(world.student)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert world.run() == 2
    assert "no weights in safetensors" in capsys.readouterr().err


def test_code_next_to_safe_weights_is_not_run(trap):
    world, _, marker = trap
    assert world.run(max_steps=1, validation_file=None) == 0
    assert not marker.exists()


def test_a_type_that_only_its_own_code_knows_is_refused(trap, capsys, monkeypatch):
    world, folder, marker = trap
    monkeypatch.setattr("builtins.input", lambda *text: pytest.fail("a prompt"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "evil"}))
    assert world.run() == 2
    assert str(folder) in capsys.readouterr().err
    assert not marker.exists()


def test_attention_code_named_in_a_config_is_not_fetched(world, monkeypatch):
    path = Path(world.student) / "config.json"
    told = {"attn_implementation": "kernels-community/evil", "_attn_implementation": "evil/evil"}
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    asked = []
    adjust = PreTrainedModel._check_and_adjust_attn_implementation

    def recorded(self, name, *others, **more):
        asked.append(name)
        return adjust(self, name, *others, **more)

    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", recorded)
    load.load_reader(world.student, "--student")
    assert asked and set(asked) <= {None, "sdpa"}


def test_hub_models_are_asked_for_safetensors_alone(monkeypatch):
    wanted = {}

    def download(name, **arguments):
        wanted.update(arguments)
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(UserError, match="neither a folder nor a model"):
        load.local_folder("some/model", "--teacher")
    patterns = wanted["allow_patterns"]
    assert "*.safetensors" in patterns
    assert not any(
        Path(name).match(pattern)
        for name in ("pytorch_model.bin", "model.pt", "model.ckpt", "evil.py", "a.pkl", "model.h5")
        for pattern in patterns
    )


ESCAPES = (
    "../../escape",
    "/tmp/escape",
    "~/escape",
    "..",
    "a/../../b",
    "con\0trol",
    "x\ny",
    "é" * 300,
)


def tree(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_ids_and_titles_name_no_file(world, monkeypatch, capsys):
    monkeypatch.chdir(world.path)
    monkeypatch.setenv("HOME", str(world.path / "home"))
    data = json.loads(Path(world.train_file).read_text())
    for number, name in enumerate(ESCAPES):
        data["data"][number]["title"] = name
        data["data"][number]["paragraphs"][0]["qas"][0]["id"] = name
    Path(world.train_file).write_text(json.dumps(data))
    before = tree(world.path)
    own = ("out", "cache", "scores")
    assert world.run(validation_file=world.train_file, max_steps=2, save_steps=1) == 0
    flags = ["--model", str(world.output), "--data", world.train_file, "--max_seq_length", "200"]
    flags += ["--output_dir", "scores", "--cache_dir", str(world.path / "cache")]
    assert evaluate.main(flags) == 0
    assert set(json.loads(Path("scores/predictions.json").read_text())) > set(ESCAPES)
    new = tree(world.path) - before
    assert {path.split("/")[0] for path in new} == set(own)
    assert not any("escape" in path or "é" in path for path in new)
    assert not Path("/tmp/escape").exists()


def test_a_link_in_the_output_folder_is_not_written_through(world, capsys):
    assert world.run(max_steps=1, save_steps=1) == 0
    mine = world.path / "mine"
    mine.mkdir()
    (mine / "precious").write_text("mine")
    for name in ("run.json.new", "train_log.jsonl", "checkpoint-1/optimizer.safetensors"):
        kept = world.path / "kept"
        shutil.copytree(world.output, kept)
        (world.output / name).unlink(missing_ok=True)
        (world.output / name).symlink_to(mine / "precious")
        assert world.run(max_steps=2, save_steps=1, resume_from_checkpoint="last") == 2
        assert "holds a link" in capsys.readouterr().err
        shutil.rmtree(world.output)
        kept.rename(world.output)
    assert (mine / "precious").read_text() == "mine"
