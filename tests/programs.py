"""A small run of kdfast.train: its files, its flags, and what it logged."""

import json
import sys
from dataclasses import fields
from pathlib import Path

from kdfast import train
from kdfast.training.log import Speed
from tests import corpora, forks, readers


class World:
    """Folders and files below `path`, and run(**flags), which calls the program.

    name, config: of teacher and student; see `readers.make`.
    """

    def __init__(self, path: Path, name: str = "bert", **config):
        self.path = path
        self.output = path / "out"
        self.teacher = readers.save(path / "teacher", name, layers=4, seed=1, **config)
        self.student = readers.save(path / "student", name, seed=2, **config)
        self.train_file = corpora.write(path / "train.json", 20)
        self.validation_file = corpora.write(path / "dev.json", 5)

    def flags(self, **changes) -> list[str]:
        values = {
            "teacher": self.teacher,
            "student": self.student,
            "train_file": self.train_file,
            "validation_file": self.validation_file,
            "output_dir": self.output,
            "cache_dir": self.path / "cache",
            "max_steps": 6,
            "train_batch_size": 8,
            "max_seq_length": 200,
            "learning_rate": 1e-2,
            **changes,
        }
        flags = []
        for name, value in values.items():
            if value is True:
                flags.append(f"--{name}")
            elif isinstance(value, (list, tuple)):
                flags += [f"--{name}", *map(str, value)]
            elif value is not None:
                flags += [f"--{name}", str(value)]
        return flags

    def run(self, **changes) -> int:
        return train.main(self.flags(**changes))


def ranks_of(world, count, **changes):
    """Exit statuses of the program at `count` ranks, and what each printed to stderr."""
    world.path.joinpath("said").mkdir(exist_ok=True)

    def rank(number):
        said = (world.path / "said" / str(number)).open("w")
        sys.stderr, sys.stdout = said, said
        status = train.main(world.flags(**changes))
        said.close()
        return status

    statuses = forks.run(count, rank)
    return statuses, [(world.path / "said" / str(n)).read_text() for n in range(count)]


def log_of(folder: Path) -> list[dict]:
    """The lines of a run's log, without what a clock decides."""
    lines = map(json.loads, (folder / "train_log.jsonl").read_text().splitlines())
    clock = {each.name for each in fields(Speed)}
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def config_of(folder: Path) -> dict:
    """The settings in a run's run.json."""
    return json.loads((folder / "run.json").read_text())["config"]


def edit(folder: Path, name: str, /, **changes) -> dict:
    """Change values of a JSON file in the folder; A__B is B within A. Returns the whole."""
    path = folder / name
    content = json.loads(path.read_text())
    for key, value in changes.items():
        *above, last = key.split("__")
        at = content
        for each in above:
            at = at[each]
        at[last] = value
    path.write_text(json.dumps(content))
    return content
