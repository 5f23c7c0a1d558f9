"""What goes to the hub, who may push, and what stays where it fails."""

import json
import os
import re
from pathlib import Path

import pytest
from huggingface_hub import constants

from kdfast import card as program
from kdfast.cards import push
from kdfast.common.errors import UserError
from kdfast.tokenizers import vocabulary_files
from tests import hub, readers
from tests.programs import edit

ME = {"name": "me", "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "guests"}]}
USERS = {
    "mine": ME,
    "reads": {**ME, "auth": {"accessToken": {"role": "read"}}},
    "guest": {**ME, "orgs": [{"name": "lab", "roleInOrg": "read"}]},
}
SHOWN = {f"figures/{name}.png" for name in ("loss", "evaluation", "agreement", "tradeoff")}
MODEL = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def server(monkeypatch):
    """A hub, which HfApi asks with the token "mine"; what it was asked and sent."""
    with hub.server_of(users=USERS) as (url, told):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "mine")
        yield told


def card(finished, *flags) -> int:
    return program.main(["--model_dir", str(finished.folder), *flags])


def content(folder: Path) -> dict[str, bytes]:
    found = (each for each in folder.rglob("*") if each.is_file())
    return {each.relative_to(folder).as_posix(): each.read_bytes() for each in found}


def litter(folder: Path) -> None:
    """Fill a run's folder with all that a run, a user or another program may leave there."""
    below = ("checkpoint-3", "best", "best.old", "last", "eval", "tensorboard", "figures", "layers")
    below += ("model.new", ".rehearsal", "cache/features", "vocab", "tokenizer", ".git", ".cache")
    below += (".eval_results", "runs/1", "node_modules/x")
    names = (*MODEL, *push.TOKENIZER, push.INDEX, "README.md", "run.json", "train.json", ".env")
    for place in below:
        (folder / place).mkdir(parents=True, exist_ok=True)
        for name in (*names, "model-00001-of-00002.safetensors", "secret.png", "secret.yaml"):
            if not (folder / place / name).exists():
                (folder / place / name).write_text("secret")
    for name in (
        *(
            ".env",
            ".lock",
            ".netrc",
            ".README.md.new",
            ".config.json.new",
            ".new",
            ".gitattributes",
        ),
        *(
            "notes.txt",
            "train.json",
            "dev.jsonl",
            "id_rsa",
            "credentials.json",
            "token",
            "nohup.out",
        ),
        *("tokenizer-notes.txt", "tokenizer_passwords.json", "vocabulary.txt", "vocab.txt.bak"),
        *("sentencepiece.log", "config.json.bak", "my.safetensors", "student-weights.safetensors"),
        *("pytorch_model.bin", "optimizer.pt", "training_args.bin", "modeling_evil.py"),
        *("model-00001-of-00002.safetensors", "model.safetensors.new", push.INDEX, "report.html"),
        *("figures/secret.svg", "README.md~", "readme.md", "CONFIG.JSON", "a\nb", "*", "[c]"),
    ):
        (folder / name).write_text("secret")
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "config.json").write_text("secret")
    (folder / "added").symlink_to(outside)
    (folder / "preprocessor_config.json").symlink_to(outside / "config.json")
    os.mkfifo(folder / "pipe")


def test_only_names_of_the_list_go_up(finished, server, capsys):
    litter(finished.folder)
    assert card(finished, "--push_to_hub", "me/reader") == 0, capsys.readouterr().err
    sent = server["pushed"]["me/reader"]
    # Weights of another program leave the results out, and the pictures of these with them.
    shown = set(re.findall(r"!\[.*?\]\((.*?)\)", sent["README.md"].decode()))
    assert {"figures/loss.png", "figures/evaluation.png"} == shown
    assert set(sent) == {*MODEL, "README.md", *shown}
    for name in {*MODEL, *shown}:
        assert sent[name] == (finished.folder / name).read_bytes()
    for text in sent.values():
        assert b"secret" not in text and str(finished.folder.parent).encode() not in text
    assert "/me/reader." in capsys.readouterr().out


def test_results_and_a_model_in_parts_go_up(finished, server):
    named = {"file": None, "dataset": "rajpurkar/squad_v2", "config": "squad_v2"}
    edit(finished.folder, "eval/dev.eval.json", **named, split="validation")
    assert card(finished, "--push_to_hub", "lab/reader") == 0
    assert set(server["pushed"]["lab/reader"]) == {
        *(*MODEL, *SHOWN, "README.md", ".eval_results/dev.yaml")
    }
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (finished.folder / push.MODEL_FILE).rename(finished.folder / shards[0])
    (finished.folder / shards[1]).write_text("the rest")
    index = finished.folder / push.INDEX
    index.write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}))
    assert push.model_files(finished.folder)[:4] == ["config.json", push.INDEX, *shards]
    for names in ([], ["../secret.safetensors"], [*shards, "notes.txt"]):
        index.write_text(json.dumps({"weight_map": {name: name for name in names}}))
        with pytest.raises(UserError, match="nothing is uploaded"):
            push.model_files(finished.folder)


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2", "xlm-roberta"])
def test_all_that_saving_writes_goes_up(tmp_path, kind):
    folder = Path(readers.save(tmp_path / "it", kind))
    assert sorted(push.model_files(folder)) == sorted(each.name for each in folder.iterdir())


def test_the_list_has_every_familys_vocabulary():
    assert {name for files in vocabulary_files.FILES.values() for name in files} <= set(
        push.TOKENIZER
    )


@pytest.mark.parametrize("name", ["config.json", "figures", "tokenizer.json", "model.safetensors"])
def test_what_a_link_leads_to_never_goes_up(finished, server, name):
    outside = finished.folder.parent / "outside"
    (finished.folder / name).rename(outside)
    (finished.folder / name).symlink_to(outside)
    with pytest.raises(UserError, match="is a link, which is not followed"):
        push.push(finished.folder, "me/reader", "the card", ["figures/loss.png"])
    assert not server["asked"]


def test_the_card_names_the_repository_once_it_is_there(finished, server, capsys):
    assert card(finished) == 0 and not server["asked"]  # off by default
    before = content(finished.folder)
    server["fault"].append((500, "no room"))
    assert card(finished, "--push_to_hub", "me/reader") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: The model is trained and stands in {finished.folder}, but")
    assert "500" in said and said.count("\n") == 1
    again = f"python -m kdfast.card --model_dir {finished.folder} --push_to_hub me/reader.\n"
    assert said.endswith(again)
    assert content(finished.folder) == before
    server["fault"].clear()
    assert card(finished, "--push_to_hub", "me/reader") == 0
    changed = {name for name, each in content(finished.folder).items() if before[name] != each}
    assert changed == {"README.md", "card.json"}
    assert "# me/reader" in (finished.folder / "README.md").read_text()
    assert server["pushed"]["me/reader"]["README.md"] == (
        (finished.folder / "README.md").read_bytes()
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"HF_TOKEN": "theirs"}, "the hub does not know the token: log in by hf auth login"),
        ({"HF_TOKEN": None}, "there is no token: log in by hf auth login, or set HF_TOKEN."),
        ({"HF_TOKEN": "reads"}, "the token of me may only read"),
        ({"repo": "you/reader"}, "of me, who may not write to you: name me, lab"),
        ({"HF_TOKEN": "guest", "repo": "lab/reader"}, "who may not write to lab: name me"),
        ({"HF_HUB_OFFLINE": True}, "HF_HUB_OFFLINE keeps it from the hub: unset that."),
        ({"ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 does not answer (ConnectError"),
        ({"repo": "reader"}, "is no repository's id: give USER/NAME."),
        ({"repo": "me/../reader"}, "is no repository's id: give USER/NAME."),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_the_data_are_read(
    world, server, monkeypatch, capsys, change, said, tmp_path
):
    repo = change.pop("repo", "me/reader")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for name, value in change.items():
        if name != "HF_TOKEN":
            monkeypatch.setattr(constants, name, value)
        elif value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    assert world.run(push_to_hub=repo, train_file="missing.json") == 2
    error = capsys.readouterr().err
    assert f"--push_to_hub {repo}" in error and said in error and error.count("\n") == 1
    assert not world.output.exists() and not server["pushed"]


def test_a_run_that_cannot_push_at_its_end_has_its_model_and_card(world, server, capsys):
    server["fault"].append((403, "no"))
    assert world.run(push_to_hub="me/reader", max_steps=1, validation_file=None) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: The model is trained and stands in {world.output}, but --push")
    assert "the token has no right to it" in said and said.count(str(world.output)) == 2
    assert "# out\n" in (world.output / "README.md").read_text()
    assert json.loads((world.output / "card.json").read_text())["repository"] is None
    server["fault"].clear()
    assert program.main(said.split("kdfast.card ")[1].rstrip(".\n").split()) == 0
    assert set(server["pushed"]["me/reader"]) > MODEL
