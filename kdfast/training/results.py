"""What a run leaves in its folder as it goes: log, evaluations, checkpoints, the student."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from kdfast.common.errors import UserError, first_line
from kdfast.common.folders import remove
from kdfast.common.progress import training_bar
from kdfast.config import TrainConfig
from kdfast.data.windows import Windows
from kdfast.evaluation import scoring
from kdfast.models.load import Loaded
from kdfast.models.save import (
    fault_of_model,
    keep_weights,
    kept_models,
    list_checkpoints,
    place_copy,
    place_model,
    replace_model,
)
from kdfast.training.assemble import Training
from kdfast.training.checkpoint import BEST, keep_last, save_checkpoint
from kdfast.training.flops import matmul_rate
from kdfast.training.log import Clock, TrainLog, progress_line
from kdfast.training.nonfinite import NonfiniteSteps
from kdfast.training.step import Callback, StepReport


class Results(Callback):
    """Log, evaluations, checkpoints and the student of a run.

    All ranks call all methods, and the first one writes. Raises UserError where the disk is full.

    Args:
        config: All settings.
        training: The run as it trains.
        student: Its model with the tokenizer.
        windows: Those of the training data.
        validation: What is evaluated, if anything.
        identity: What a resumed run must share with this one.

    Attributes:
        evaluation: The latest since this process started, or None.
    """

    def __init__(
        self,
        config: TrainConfig,
        training: Training,
        student: Loaded,
        windows: Windows,
        validation: scoring.ValidationSets | None,
        identity: dict[str, Any],
    ):
        run, progress = training.run, training.progress
        self.config = config
        self.training = training
        self.student = student
        self.validation = validation
        self.identity = identity
        self.run = run
        self.progress = progress
        self.output = run.output
        self.evaluation: scoring.Measured | None = None
        self.nonfinite = NonfiniteSteps(training, windows)
        self.matmul_rate = matmul_rate(run.device, run.dtype or torch.float32)
        self.clock = Clock(training.work, self.matmul_rate, progress.clock)
        self.bar = training_bar(progress.steps, training.total_steps, run.ranks.is_first)
        self._saved = progress.steps  # a run that was resumed there has that checkpoint
        self._placed = False
        self.log: TrainLog | None = None
        if run.ranks.is_first:
            tensorboard = config.output.report_to == "tensorboard"
            self.log = TrainLog(run.output, progress.steps, progress.evaluated, tensorboard)
            if self.log.lost:
                run.ranks.log(self.log.lost)

    def log_step(self, report: StepReport, indices: np.ndarray) -> None:
        """Count, log and show a step over the windows `indices`."""
        speed = self.clock.add(report, self.training.cuts.lengths[indices])
        if self.log:
            self.log.step(report, speed)
        line = progress_line(report, speed)
        steps, total = self.progress.steps, self.training.total_steps
        self.bar.set_postfix_str(line, refresh=False)
        self.bar.update()
        if self.bar.disable and steps % max(1, total // 10) == 0:
            self.run.ranks.log(f"step {steps} of {total}: {line}")

    def check_finite(self, report: StepReport, micro_batches: list[np.ndarray]) -> None:
        """Raise UserError for a step that must end the run; say which one was skipped."""
        if skipped := self.nonfinite.check(report, micro_batches):
            self.run.ranks.log(skipped)

    def evaluate_if_due(self) -> None:
        """Evaluate, and keep the model where it is the best so far.

        Where a signal ends an evaluation, it is still due.
        """
        progress, every = self.progress, self.config.evaluation.eval_steps
        if self.validation is None or progress.evaluated >= progress.steps:
            return
        if self.run.stop.agreed or not self._is_due(every):
            return
        self.bar.refresh()  # or it would show an earlier step as long as this takes
        with self.clock.stopped():
            self.nonfinite.check_logits()
            evaluation = self.validation.score_unless_stopped(self.student.model, self.run)
            self.evaluation = evaluation or self.evaluation
            if evaluation is None:
                return
            is_best = self._is_best(evaluation.metrics)
            progress.evaluated, progress.validation = progress.steps, self.validation.key
            if self.log:
                self.log.evaluation(progress.steps, evaluation.metrics)
                if is_best:
                    progress.best_digest = replace_model(
                        self.output / BEST, self.student.model, self.student.tokenizer
                    )
        self.run.ranks.log(f"step {progress.steps}: {scoring.line(evaluation.metrics)}")
        if self.training.stopped_early:
            self.run.ranks.log(
                f"Stopped early after step {progress.steps} of {self.training.total_steps}: no "
                f"gain in {progress.patience_counter} evaluations; the best was after step "
                f"{progress.best_steps}."
            )
            self.place_student_if_last()

    def _is_best(self, found: dict[str, float]) -> bool:
        """Whether these figures are the best so far, which progress then holds.

        As in transformers' EarlyStoppingCallback, any better figure is the best, and only one that
        is better by more than the threshold is a gain.
        """
        progress, settings = self.progress, self.config.evaluation
        by_f1 = settings.metric_for_best_model == "f1"
        figure, best = found["exact"], progress.best_exact
        if by_f1:
            figure, best = found["f1"], progress.best_f1
        gain = math.inf if best is None else figure - best
        progress.patience_counter += 1
        if gain > settings.early_stopping_threshold:
            progress.patience_counter = 0
        if gain <= 0:
            return False
        progress.best_f1, progress.best_exact = found["f1"], found["exact"]
        progress.best_steps = progress.steps
        return True

    def save_if_due(self) -> None:
        """Write a checkpoint every --save_steps, and after the last step."""
        every = self.config.output.save_steps
        if every and self._saved < self.progress.steps and self._is_due(every):
            if self.run.stop.agreed:
                return  # `save` follows
            self.save()
            self.run.stop.can_resume = True

    def save(self) -> None:
        """Write a checkpoint of the steps so far, unless there is one.

        Raises UserError for weights that are not finite, or whose logits are not, before good ones
        are replaced.
        """
        with self.clock.stopped():
            self.nonfinite.check_logits()
        if self.log and self._saved < self.progress.steps:
            with self.clock.stopped():
                self.log.flush()
                self.progress.clock = self.clock.sums.tolist()
                save_checkpoint(
                    self.training,
                    self.student.tokenizer,
                    self.identity,
                    self.config.output.save_total_limit,
                )
        self._saved = self.progress.steps

    def place_student_if_last(self) -> None:
        """After the last step, put the model into output_dir before anything else can fail.

        Raises UserError where most steps were skipped: a checkpoint has the weights then; and where
        weights or logits are not finite.
        """
        if not self.training.is_over or self._placed or self.run.stop.agreed:
            return
        if fault := self.nonfinite.why_too_few_updates():
            self.save()
            raise UserError(f"{fault}{kept_models(self.output)}.")
        with self.clock.stopped():
            self.nonfinite.check_logits()
            if self.log:
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
        """Errors inside, once the student is saved, become a UserError that names its folder."""
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
            self.evaluation = self.validation.score(self.student.model, self.run)
        if not self.log:
            return
        self.log.close()
        if self.config.output.save_steps:  # the last save may have failed at deleting others
            keep_last(self.output, self.config.output.save_total_limit)
        best, last = self.output / BEST, self.output / "last"
        if not self.config.evaluation.load_best_model_at_end:
            remove(last)  # of a run that this one was resumed from
            return
        replace_model(last, self.student.model, self.student.tokenizer)
        if fault := fault_of_model(best, self.progress.best_digest or ""):
            remedy = "use the last one, or train again"
            if list_checkpoints(self.output):
                remedy = "repeat the command with --resume_from_checkpoint last"
            raise UserError(
                f"{best} is not the model that was written after step {self.progress.best_steps} "
                f"({fault}) and is not put into --output_dir: {remedy}."
            )
        place_copy(best, self.output)

    def figures(self) -> dict[str, Any]:
        """Training figures for run.json. train_speed covers the steps before a resume too."""
        progress, found, speed = self.progress, self.evaluation, self.clock.speed()
        return {
            "steps": progress.steps,
            "updates": self.training.optimizer.updates,
            "starts": progress.starts,
            "cuts": asdict(self.training.cuts.policy),
            "train_speed": speed and asdict(speed),
            **(self.validation.named() if self.validation else {}),
            "metrics": None if found is None else found.metrics,
            "eval_windows_per_second": None if found is None else found.windows_per_second,
            "best_f1": progress.best_f1,
            "best_steps": progress.best_steps,
            "early_stopping": self._early_stopping(),
        }

    def _early_stopping(self) -> dict[str, Any] | None:
        """What run.json says of a run that has stopped early; None of another."""
        if not self.training.stopped_early:
            return None
        return {
            "planned_steps": self.training.total_steps,
            "evaluations_without_gain": self.progress.patience_counter,
        }

    def _is_due(self, every: int | None) -> bool:
        """Every so many steps, and after the last one."""
        steps = self.progress.steps
        return self.training.is_over or (every is not None and steps > 0 and steps % every == 0)
