"""What happens around the steps of the training loop."""

import numpy as np

from kdfast.training.step import StepReport


class Callback:
    """The loop calls each of these after every step, in this order. Here they do nothing."""

    def log_step(self, report: StepReport, indices: np.ndarray) -> None:
        """A step over the windows `indices` has ended."""

    def check_finite(self, report: StepReport, micro_batches: list[np.ndarray]) -> None:
        """Raise UserError for a step after which the run must not go on."""

    def place_student_if_last(self) -> None:
        """Put the trained model into its place after the last step."""

    def evaluate_if_due(self) -> None:
        """Evaluate every so many steps."""

    def save_if_due(self) -> None:
        """Write a checkpoint every so many steps."""
