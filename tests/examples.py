"""Runs the examples of a document: its fenced blocks of Python and shell, in their order.

Nothing is downloaded. Models of the hub are tiny readers in a hub cache, its data sets a few
made-up questions, and what `make train` leaves is the embedded teacher. An example that needs
something else fails here: give it a stand-in, in PLACEHOLDERS, Place or `names`.
"""

import contextlib
import importlib
import io
import json
import re
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import datasets
import torch
from huggingface_hub import constants
from torch.distributed.run import get_args_parser
from torch.nn import functional

import kdfast
from kdfast.demo import TEACHER
from kdfast.synthetic import generators
from tests import corpora, readers

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What an example prints, where it says so: print(...)  # 248
CLAIM = re.compile(r"^ *print\(.*\)  # (.*)$", re.MULTILINE)
ANSWER = ("text", "answer_start")
HUB_MODELS = {"deepset/roberta-large-squad2": 4, "roberta-base": 2}  # name -> layers
# The head of a script of an array job: its name, and the number of its last task.
SLURM = re.compile(r"#!/bin/sh\n# (\S+)\n#SBATCH .*--array=0-(\d+).*\n")
# What the examples use of Ray and Spark: each task runs where it is asked for.
RAY = SimpleNamespace(
    remote=lambda **resources: lambda task: SimpleNamespace(remote=task),
    get=lambda results: results,
)
SPARK = SimpleNamespace(
    SparkContext=SimpleNamespace(
        getOrCreate=lambda: SimpleNamespace(
            parallelize=lambda items, slices: SimpleNamespace(
                foreach=lambda task: [task(item) for item in items]
            )
        )
    )
)
# Setting up an environment: nothing of kdfast runs there.
SET_UP = ("python -m venv ", "pip install ")
# What a command runs with here that it does not say, so that it ends soon.
SOON = {
    "train": ["--max_steps", "1", "--train_batch_size", "8"],
    # A teacher with random weights agrees with nobody.
    "questions": ["--margin_over", "second_span", "--min_margin", "0"],
}
PLACEHOLDERS = {
    "--teacher": "deepset/roberta-large-squad2",
    "--student": "roberta-base",
    "--train_file": "dev-v2.0.json",
    "--output_dir": "other",
    "--cache_dir": "cache",
}


class Curious:
    """A stand-in for what asks an endpoint."""

    name, revision, together = "curious", "", False

    def __init__(self, *_):
        pass

    def replies(self, prompts, batch):
        """The same question to each prompt."""
        return [generators.Reply('{"question": "Who is it?", "answer": "Rollo"}') for _ in prompts]


class Place:
    """A folder to run examples in, which holds what they take for granted."""

    def __init__(self, folder: Path, monkeypatch):
        for name in ("dev-v2.0.json", "train-v2.0.json", "jaquad_train.json", "questions.jsonl"):
            corpora.write(folder / name)
        answers = {row["id"]: "Rollo" for row in rows()}
        (folder / "predictions.json").write_text(json.dumps(answers))
        (folder / "null_odds.json").write_text(json.dumps(dict.fromkeys(answers, 0.5)))
        monkeypatch.chdir(folder)
        monkeypatch.setenv("HOME", str(folder / "home"))
        hub_set = datasets.Dataset.from_list(rows())
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub_set)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        for name, layers in HUB_MODELS.items():
            home = folder / "hub" / f"models--{name.replace('/', '--')}"
            (home / "refs").mkdir(parents=True)
            (home / "refs" / "main").write_text("0" * 40)
            readers.save(home / "snapshots" / ("0" * 40), "roberta", layers=layers)
        monkeypatch.setattr(generators, "Endpoint", Curious)
        self.names = names()
        self.scripts: dict[str, tuple[int, str]] = {}
        for name, stand_in in {"ray": RAY, "pyspark": SPARK}.items():
            monkeypatch.setitem(sys.modules, name, stand_in)

    def run(self, language: str, code: str) -> None:
        """Runs one block. Raises AssertionError where it does not do what it says."""
        if language == "python":
            self.python(code)
        elif language == "sh" and (script := SLURM.match(code)):
            self.scripts[script[1]] = (int(script[2]), code)
        elif language == "sh":
            for line in code.replace("\\\n", " ").splitlines():
                for command in line.split(" && "):
                    self.command(command.strip())
        else:
            raise AssertionError(f"nobody knows how to run a block of {language!r}")

    def sbatch(self, name: str) -> None:
        """Runs the script of an array job that an earlier block shows, task after task."""
        last, code = self.scripts[name]
        for task in range(last + 1):
            self.run("sh", SLURM.sub("", code).replace("$SLURM_ARRAY_TASK_ID", str(task)))

    def python(self, code: str) -> str:
        """What the code prints. It shares its names with the blocks before it."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "example", "exec"), self.names)
        claimed = CLAIM.findall(code)
        if claimed:
            assert printed.getvalue().splitlines() == claimed
        return printed.getvalue()

    def command(self, command: str) -> None:
        words = shlex.split(command, comments=True)
        if not words or command.startswith((*SET_UP, ". ")):
            return
        if words[0] == "sbatch":
            self.sbatch(words[-1])
            return
        if words[0] == "make":
            self.make(words[1])
            return
        if words[0] == "torchrun":
            given = get_args_parser().parse_args(words[1:])
            assert given.module
            module, words = given.training_script, given.training_script_args
        else:
            assert words[:2] == ["python", "-m"], f"nobody knows how to run {command!r}"
            module, words = words[2], words[3:]
        words = [
            PLACEHOLDERS.get(flag, word) if word == "…" else word
            for flag, word in pairwise(["", *words])
        ]
        if "…" in words:  # all flags
            words = [each for pair in PLACEHOLDERS.items() for each in pair]
        main = importlib.import_module(module).main
        assert main([*words, *SOON.get(module.rpartition(".")[2], [])]) == 0, command

    def make(self, target: str) -> None:
        makefile = (ROOT / "Makefile").read_text()
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
        if target == "train":
            self.make_train()

    def make_train(self) -> None:
        """What `make train` leaves, with the teacher in the student's place."""
        shutil.copytree(TEACHER, "kdfast-demo/distilled")


def rows() -> list[dict]:
    """The questions of dev-v2.0.json as a data set of the hub has them."""
    found = []
    for number in range(12):
        (paragraph,) = corpora.article(number)["paragraphs"]
        for asked in paragraph["qas"]:
            answers = {key: [each[key] for each in asked["answers"]] for key in ANSWER}
            found.append({**asked, "context": paragraph["context"], "answers": answers})
    return found


def names() -> dict:
    """What an example speaks of without making it."""
    torch.manual_seed(0)
    hidden = torch.randn(3, 8, 4)
    return {
        "kdfast": kdfast,
        "F": functional,
        "T": 1.5,
        "w": 0.75,
        "student_logits": torch.randn(3, 8, 2),
        "teacher_logits": torch.randn(3, 8, 2),
        "start_positions": torch.tensor([0, 2, 5]),
        "end_positions": torch.tensor([0, 3, 5]),
        "attention_mask": torch.ones(3, 8, dtype=torch.int64),
        "inputs": {},
        "encoder": lambda: type("Output", (), {"last_hidden_state": hidden}),
        "head": torch.nn.Linear(4, 2),
    }


def blocks(document: Path) -> list[tuple[int, str, str]]:
    """(line, language, code) of each fenced block of a document."""
    text = document.read_text(encoding="utf-8")
    return [
        (text[: found.start()].count("\n") + 1, found[1], found[2])
        for found in BLOCK.finditer(text)
    ]
