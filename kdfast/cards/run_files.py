"""What a finished run left in its folder: where the card, pictures and report get every figure."""

import os
import re
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kdfast.cards.forms import EVALUATION, STEP, questions_form, result_form, run_form
from kdfast.common.errors import UserError
from kdfast.common.files import is_plain_name, listed, read_json_object, read_record, sha256_of
from kdfast.models.save import RUN_FILE
from kdfast.teachers.cache import weights_key
from kdfast.training.log import LOG_FILE, lost_steps, read_log

EVAL_FOLDER = "eval"
RESULT_FORMAT = 1  # of kdfast.evaluate
RESULT_END = ".eval.json"
QUESTIONS_END = ".questions.json"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[^:]+)?(:[\w.-]+){0,2}")
FILE_ENDS = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".gz")  # of data; no hub id has them

Record = dict[str, Any]  # a JSON object


class Source(NamedTuple):
    """Data as a flag named it: a hub dataset, or a local file by its name without folders."""

    name: str
    on_hub: bool
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    @classmethod
    def of(cls, text: str, local_paths: Container[str] = ()) -> "Source":
        """Read a flag's value: a file, or id[@revision][:config[:split]]."""
        if is_local(text, local_paths):
            return cls(base_name(text), on_hub=False)
        place, _, part = text.partition(":")
        name, _, revision = place.partition("@")
        config, _, split = part.partition(":")
        return cls(name, True, config or None, split or None, revision or None)

    @classmethod
    def of_result(cls, result: Record) -> "Source":
        """Read what kdfast.evaluate wrote: the file that it read, or else the suite's set."""
        if result["file"] is not None:
            return cls.of(result["file"])
        return cls(result["dataset"], True, result["config"], result["split"], result["revision"])


class Evaluated(NamedTuple):
    """One of the models in a result: its name, what it is, and how it answered."""

    name: str
    model: Record
    figures: Record


@dataclass(frozen=True)
class RunFiles:
    """The result files of one run.

    Attributes:
        folder: The run's folder.
        run: run.json.
        steps: Lines of train_log.jsonl, one per step.
        evaluations: Lines of train_log.jsonl, one per evaluation during the run.
        results: eval/NAME.eval.json of the weights in `folder`, by name.
        notes: Sentences on what is left out, and on steps that the log lacks.
    """

    folder: Path
    run: Record
    steps: list[Record]
    evaluations: list[Record]
    results: list[Record]
    notes: list[str]

    @property
    def config(self) -> Record:
        return self.run["config"]

    @property
    def layers_stage(self) -> Record | None:
        """The settings of the run of stage layers that came before, or None."""
        return self.run.get("layers_stage")

    @property
    def name(self) -> str:
        """What to call the model: its folder, or that of both stages."""
        folder = self.folder.resolve()
        both = self.layers_stage is not None and folder.name == "predictions"
        return folder.parent.name if both else folder.name

    @property
    def origin(self) -> str:
        """The model whose weights the student had before any stage."""
        first = self.layers_stage or self.config
        return first["student"] or first["teacher"][0]

    @property
    def student_layers(self) -> str | None:
        """The layers of `origin` that the student had, or None for all."""
        return (self.layers_stage or self.config)["student_layers"]

    @property
    def first_teacher(self) -> str | None:
        """The first model that taught, as a flag named it; None in a run on gold spans alone."""
        return self.config["teacher"][0] if self.config["distillation_loss_weight"] else None

    @property
    def teachers(self) -> list[str]:
        """What to call the models that taught."""
        return [self.short(name) for name in self.config["teacher"]] if self.first_teacher else []

    def is_local(self, name: str) -> bool:
        """Whether a model or data set of the run was a path rather than the hub's."""
        return is_local(name, self.run.get("local_paths", ()))

    def short(self, name: str) -> str:
        """A hub id as it is, a path without its folders."""
        return base_name(name) if self.is_local(name) else name

    def sources(self, files: str | list[str]) -> list[Source]:
        """The data that a flag of the run named: a file, or several."""
        names = [files] if isinstance(files, str) else files
        return [Source.of(each, self.run.get("local_paths", ())) for each in names]

    def metrics(self) -> dict[str, float] | None:
        """Of the weights in `folder` on --validation_file; None where they were not evaluated."""
        if not self.config["load_best_model_at_end"]:
            return self.run["metrics"]
        name, best = "evaluated_after", self.run.get("best_steps")
        if best is None:  # of an earlier version
            name, best = "f1", self.run["best_f1"]
        of_best = (line for line in self.evaluations if line[name] == best)
        return next((line for line in of_best if line["f1"] == self.run["best_f1"]), None)

    def validation_data(self) -> list[tuple[str, Source]]:
        """What the run was evaluated on, each with a label."""
        named, end = self.config["validation_file"], ""
        if named is None:
            named, end = self.config["train_file"], " (held out)"
        return [(f"{each.name}{end}", each) for each in self.sources(named)]

    def validated(self) -> list[Record]:
        """`metrics` of each file, with its name as `label`."""
        found = self.metrics()
        if not found:
            return []
        rule = {key: self.run[key] for key in ("metric", "language") if key in self.run}
        files: Any = found.get("files", [rule | found])
        return [
            {**each, "label": label, "source": source}
            for each, (label, source) in zip(files, self.validation_data(), strict=False)
        ]

    def result_of_validation(self) -> Record | None:
        """The evaluation, after the run, of the data that --validation_file names."""
        named = self.config["validation_file"]
        if not isinstance(named, str):  # of several, each evaluation is one of its own
            return None
        (wanted,) = self.sources(named)
        for each in self.results:
            if each["file"] == named or (wanted.on_hub and Source.of_result(each) == wanted):
                return each
        return None

    def questions(self, result: Record) -> dict[str, Record]:
        """Question id -> what the model made of it, and what the other one under "compared".

        Raises UserError where the file is damaged, or was written with another result.
        """
        path = self.folder / EVAL_FOLDER / f"{result['name']}{QUESTIONS_END}"
        found = read_record(path, questions_form(is_compared="compared" in result))
        known = result.get("questions_sha256")  # none in those of earlier versions
        if found and known is not None and sha256_of(path) != known:
            raise UserError(
                f"{path} is not of the evaluation in "
                f"{path.with_name(result['name'] + RESULT_END)}: run kdfast.evaluate again, or "
                "delete the former to go on without it."
            )
        return found

    def models(self, result: Record) -> list[Evaluated]:
        """This model and, if `result` compares it with one, the other: "teacher", or its name."""
        found = [Evaluated("this model", result["model"], result)]
        if "compared" in result:
            name = result["compared_with"]["name"]
            name = "teacher" if name == self.first_teacher else short(name)
            found.append(Evaluated(name, result["compared_with"], result["compared"]))
        return found


def read_run(folder: Path) -> RunFiles:
    """Read the result files below `folder`.

    Raises:
        UserError: It is no folder of a finished run, or of one that answers nothing, or run.json
            is damaged.
    """
    run = read_record(folder / RUN_FILE, run_form)
    if not run:
        raise UserError(f"{folder} holds no {RUN_FILE}: name the folder of a finished run.")
    if run["config"].get("stage") == "layers":
        raise UserError(
            f"{folder} is a run of --stage layers, which answers nothing yet: train its model in "
            "--stage predictions, and name the folder of that run."
        )
    lines = read_log(folder, run["steps"], run["steps"])
    steps = [line for line in lines if STEP(line) is None]
    own, results, notes = weights_key(folder), [], []
    if lost := lost_steps(steps, run["steps"]):
        notes.append(f"{folder}: {lost}")
    for found in listed(folder / EVAL_FOLDER, f"*{RESULT_END}"):
        result = read_json_object(found)
        if result.get("format") != RESULT_FORMAT:
            notes.append(f"{found} is left out, as this version cannot read it.")
        elif not is_plain_name(result.get("name")):
            notes.append(f"{found} is left out, as it names itself by a path.")
        elif fault := result_form(result):
            notes.append(f"{found} is left out, as it is damaged (see its {fault}).")
        elif result["model"]["weights_sha256"] != own:
            notes.append(f"{found} is left out, as it is of other weights than those in {folder}.")
        else:
            results.append(result)
    files = RunFiles(
        folder=folder,
        run=run,
        steps=steps,
        evaluations=[line for line in lines if EVALUATION(line) is None],
        results=results,
        notes=notes,
    )
    if run["config"]["load_best_model_at_end"] and run.get("best_f1") and not files.metrics():
        notes.append(
            f"{folder}: {LOG_FILE} has no line of the best evaluation, of f1 {run['best_f1']:.2f}: "
            "it is lost or damaged, and its figures are left out."
        )
    return files


def is_local(name: str, local_paths: Container[str] = ()) -> bool:
    """Whether a model or data set that a flag named is a path rather than the hub's.

    Args:
        name: The flag's value.
        local_paths: Names that were paths where the run was.
    """
    path = Path(name).expanduser()
    is_file = path.suffix in FILE_ENDS or path.exists()
    return name in local_paths or is_file or not HUB_ID.fullmatch(name)


def base_name(path: str) -> str:
    """The last part of a path, also of `.` and `..`."""
    return os.path.basename(os.path.abspath(os.path.expanduser(path)))


def short(name: str) -> str:
    """A hub id as it is, a path without its folders."""
    return base_name(name) if is_local(name) else name
