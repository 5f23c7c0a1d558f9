"""What a run leaves in its folder as it goes: log, evaluations, checkpoints, the student."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdfast.common.errors import UserError
from kdfast.common.ranks import Ranks
from kdfast.common.signals import StopSignals
from kdfast.config import TrainConfig
from kdfast.evaluation import scoring
from kdfast.models.load import Loaded, first_line
from kdfast.models.save import keep_weights, place_copy, place_model, replace_model
from kdfast.training.checkpoint import Progress, save_checkpoint
from kdfast.training.log import Clock, Speed, TrainLog
from kdfast.training.nonfinite import check_weights
from kdfast.training.optimizer import Updater
from kdfast.training.step import StepReport


@dataclass
class Results:
    """All ranks call all methods, and the first one writes.

    total: steps of the whole run. identity: what a resumed run must share with this one.
    evaluation: the last one of this process. Methods raise UserError where the disk is full.
    """

    config: TrainConfig
    output: Path
    student: Loaded
    updater: Updater
    progress: Progress
    total: int
    identity: dict[str, Any]
    validation: scoring.Validation | None
    clock: Clock
    device: torch.device
    precision: str
    ranks: Ranks
    stop: StopSignals
    evaluation: scoring.Evaluation | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._saved = self.progress.steps  # a run that was resumed there has that checkpoint
        self._placed = False
        self.log = None
        if self.ranks.is_first:
            tensorboard = self.config.report_to == "tensorboard"
            done = self.progress
            self.log = TrainLog(self.output, done.steps, done.evaluated, tensorboard)

    def step(self, report: StepReport, lengths: np.ndarray) -> Speed:
        """Count and log a step over windows of these lengths; returns its speed."""
        self.progress.steps += 1
        speed = self.clock.add(report, lengths)
        if self.log:
            self.log.step(report, speed)
        return speed

    def must_evaluate(self) -> bool:
        """Whether an evaluation is due after the steps so far."""
        steps = self.progress.steps
        return (
            self.validation is not None
            and self.progress.evaluated < steps
            and self._is_due(self.config.eval_steps)
        )

    def must_save(self) -> bool:
        """Whether a checkpoint is due after the steps so far."""
        return bool(
            self.config.save_steps
            and self._saved < self.progress.steps
            and self._is_due(self.config.save_steps)
        )

    def evaluate(self) -> str | None:
        """Evaluate, and keep the model where it is the best so far; returns a line that rank 0 is
        to say. Where the run is to stop there is none, and the evaluation is still due.
        """
        with self.clock.stopped():
            evaluation = self._score(self.stop)
            if evaluation is None:
                return None
            progress, f1 = self.progress, evaluation.metrics["f1"]
            is_best = progress.best_f1 is None or f1 > progress.best_f1
            if is_best:
                progress.best_f1 = f1
            progress.evaluated, progress.validation = progress.steps, self.validation.key
            if self.log:
                self.log.evaluation(progress.steps, evaluation.metrics)
                if is_best:
                    replace_model(self.output / "best", self.student.model, self.student.tokenizer)
        line = f"step {progress.steps}: {scoring.line(evaluation.metrics)}"
        return line if self.ranks.is_first else None

    def save(self) -> None:
        """Write a checkpoint of the steps so far, unless there is one.

        Raises UserError for weights that are not finite, before good ones are replaced.
        """
        check_weights(self.student.model, self.output)
        if self.log and self._saved < self.progress.steps:
            with self.clock.stopped():
                self.log.flush()
                self.progress.clock = self.clock.sums.tolist()
                save_checkpoint(
                    self.output,
                    self.student.model,
                    self.student.tokenizer,
                    self.updater,
                    self.progress,
                    self.identity,
                    self.config.save_total_limit,
                )
        self._saved = self.progress.steps

    def place_student(self) -> None:
        """The last model into output_dir, before anything else can fail.

        Raises UserError where no step has changed the weights, or they are not finite.
        """
        if self.updater.updates == 0:
            raise UserError(
                "No step reached the weights, as every gradient was not finite: check the "
                "student's weights, or lower --learning_rate."
            )
        check_weights(self.student.model, self.output)
        if self.log:
            with self.clock.stopped():
                self._place()
        self._placed = True

    def _place(self) -> None:
        try:
            place_model(self.output, self.student.model, self.student.tokenizer)
        except UserError:
            raise
        except Exception as error:  # of transformers or a tokenizer
            path = keep_weights(self.output, self.student.model)
            raise UserError(
                f"The student is trained and cannot be saved as a model ({first_line(error)}): its "
                f"weights are in {path}; put them into the --student by load_state_dict."
            ) from error

    @contextmanager
    def telling_where(self) -> Iterator[None]:
        """Inside, what fails once the student is in its place raises a UserError that says so."""
        try:
            yield
        except Exception as error:
            if not self._placed:
                raise
            what = str(error) if isinstance(error, UserError) else f"{first_line(error)}."
            raise UserError(f"{what} The trained student is in {self.output}.") from error

    def finish(self) -> None:
        """Close the log; under --load_best_model_at_end put the best model into output_dir, and
        the last one into last/."""
        if self.validation and self.evaluation is None:  # the run was complete already
            self._score(None)
        if not self.log:
            return
        self.log.close()
        if self.config.load_best_model_at_end:
            replace_model(self.output / "last", self.student.model, self.student.tokenizer)
            place_copy(self.output / "best", self.output)

    def figures(self) -> dict[str, Any]:
        """What run.json holds of the run's course. train_speed is that of all `steps`, those before
        the last of `starts` included, on whatever machines they ran."""
        progress, found = self.progress, self.evaluation
        return {
            "steps": progress.steps,
            "updates": self.updater.updates,
            "starts": progress.starts,
            "cuts": asdict(progress.policy),
            "train_speed": asdict(self.clock.speed()),
            **(self.validation.rule.named() if self.validation else {}),
            "metrics": None if found is None else found.metrics,
            "eval_windows_per_second": None if found is None else found.windows_per_second,
            "best_f1": progress.best_f1,
        }

    def _score(self, stop: StopSignals | None) -> scoring.Evaluation | None:
        model = self.student.model
        found = self.validation.score(model, self.device, self.precision, self.ranks, stop)
        self.evaluation = found or self.evaluation
        return found

    def _is_due(self, every: int | None) -> bool:
        """Every so many steps, and after the last one."""
        steps = self.progress.steps
        return steps >= self.total or (every is not None and steps > 0 and steps % every == 0)
