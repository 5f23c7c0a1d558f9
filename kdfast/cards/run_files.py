"""What a finished run left in its folder: where the card, pictures and report get every figure."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdfast.common.errors import UserError
from kdfast.common.files import read_json_object
from kdfast.models.save import RUN_FILE
from kdfast.teachers.cache import weights_key
from kdfast.training.log import read_log

EVAL_FOLDER = "eval"
RESULT_FORMAT = 1  # of kdfast.evaluate
FILE_ENDS = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".gz")  # of data; no hub id has them
RESULT_END = ".eval.json"
QUESTIONS_END = ".questions.json"


@dataclass(frozen=True)
class Source:
    """Data as a flag named it: a hub dataset with what of it was named, or a local file.

    name: the dataset's id, or the file's name without its folders.
    """

    name: str
    on_hub: bool
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    @classmethod
    def of(cls, text: str) -> "Source":
        """Of a flag's value: a file, or id[@revision][:config[:split]]."""
        if is_local(text) or Path(text).suffix in FILE_ENDS:
            return cls(Path(text).name, on_hub=False)
        head, config, split = (*text.split(":"), None, None)[:3]
        name, _, revision = head.partition("@")
        return cls(name, True, config, split, revision or None)

    @classmethod
    def of_result(cls, result: dict[str, Any]) -> "Source":
        """Of what kdfast.evaluate wrote: the file that was read, or else the suite's set."""
        if result["file"] is not None:
            return cls.of(result["file"])
        return cls(result["dataset"], True, result["config"], result["split"], result["revision"])


@dataclass(frozen=True)
class RunFiles:
    """The result files of one run.

    run: run.json. steps, evaluations: lines of train_log.jsonl. results: eval/NAME.eval.json of
    the weights in `folder`, by name. notes: sentences on results that are left out.
    """

    folder: Path
    run: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    results: list[dict[str, Any]]
    notes: list[str]

    @property
    def config(self) -> dict[str, Any]:
        return self.run["config"]

    @property
    def name(self) -> str:
        """What to call the model: its folder, or that of both stages."""
        folder = self.folder.resolve()
        both = self.layers_stage is not None and folder.name == "predictions"
        return folder.parent.name if both else folder.name

    @property
    def layers_stage(self) -> dict[str, Any] | None:
        """The settings of the run of stage layers that came before, or None."""
        return self.run.get("layers_stage")

    @property
    def origin(self) -> str:
        """The model whose weights the student had before any stage."""
        first = self.layers_stage or self.config
        return first["student"] or first["teacher"][0]

    def is_local(self, name: str) -> bool:
        """Whether a model or data set of the run was a path rather than the hub's."""
        return name in self.run.get("local_paths", ()) or is_local(name)

    def short(self, name: str) -> str:
        """A hub id as it is, a path without its folders."""
        return Path(name).expanduser().resolve().name if self.is_local(name) else name

    def source(self, text: str) -> Source:
        """The data that a flag of the run named."""
        if text in self.run.get("local_paths", ()):
            return Source(Path(text).name, on_hub=False)
        return Source.of(text)

    @property
    def teachers(self) -> list[str]:
        """The models that taught; none of a run on gold spans alone."""
        return self.config["teacher"] if self.config["distillation_loss_weight"] else []

    @property
    def teacher(self) -> str | None:
        """The first of them."""
        return self.teachers[0] if self.teachers else None

    def metrics(self) -> dict[str, float] | None:
        """Of the weights in `folder` on --validation_file; None where they were not evaluated."""
        if not self.config["load_best_model_at_end"]:
            return self.run["metrics"]
        for line in self.evaluations:
            if line["f1"] == self.run["best_f1"]:
                return {name: value for name, value in line.items() if name != "evaluated_after"}
        return None

    def result_of(self, source: str | None) -> dict[str, Any] | None:
        """The evaluation of the data that a flag names `source`."""
        if source is None:
            return None
        wanted = self.source(source)
        for each in self.results:
            if each["file"] == source or (wanted.on_hub and Source.of_result(each) == wanted):
                return each
        return None

    def questions(self, result: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Question id -> what the model made of it, and what the other one under "compared"."""
        path = self.folder / EVAL_FOLDER / f"{result['name']}{QUESTIONS_END}"
        return read_json_object(path) if path.is_file() else {}

    def other(self, result: dict[str, Any]) -> str | None:
        """What to call the model that `result` compares with: "teacher", or its name."""
        if "compared" not in result:
            return None
        name = result["compared_with"]["name"]
        return "teacher" if name == self.teacher else short(name)


def read_run(folder: Path) -> RunFiles:
    """The result files below `folder`. Raises UserError where there is no whole run.json."""
    path = folder / RUN_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no {RUN_FILE}: name the folder of a finished run.")
    run = read_json_object(path)
    if run.get("config", {}).get("stage") == "layers":
        raise UserError(
            f"{folder} is a run of --stage layers, which answers nothing yet: train its model in "
            "--stage predictions, and name the folder of that run."
        )
    lines = read_log(folder, run.get("steps", 0), run.get("steps", 0))
    own, results, notes = weights_key(folder), [], []
    for found in sorted((folder / EVAL_FOLDER).glob(f"*{RESULT_END}")):
        result = read_json_object(found)
        if result.get("format") != RESULT_FORMAT:
            notes.append(f"{found} is left out, as this version cannot read it.")
        elif result["model"]["weights_sha256"] != own:
            notes.append(f"{found} is left out, as it is of other weights than those in {folder}.")
        else:
            results.append(result)
    return RunFiles(
        folder=folder,
        run=run,
        steps=[line for line in lines if "step" in line],
        evaluations=[line for line in lines if "evaluated_after" in line],
        results=results,
        notes=notes,
    )


def is_local(name: str) -> bool:
    """Whether a model or data set that a flag named is a path rather than the hub's."""
    path = Path(name).expanduser()
    hub_like = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[^:]+)?(:[\w.-]+){0,2}", name)
    return path.exists() or not hub_like


def short(name: str) -> str:
    """A hub id as it is, a path without its folders."""
    return Path(name).expanduser().resolve().name if is_local(name) else name


def as_text(value: Any) -> str:
    """A setting as people write it: 3e-05 for 0.00003, JSON's words for the rest."""
    return f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')
