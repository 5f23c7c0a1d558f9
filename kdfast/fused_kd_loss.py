"""The distillation loss of extractive question answering: function, module, and the lower door."""

import torch
from torch import Tensor, nn

from kdfast.kernels import reference
from kdfast.kernels.autograd import (
    HARD,
    NO_TRANSFORMS,
    SOFT,
    differentiable_rows,
    is_graph,
    rows_of_graph,
)
from kdfast.kernels.backends import RowSettings, RowTensors, choose, choose_while_tracing
from kdfast.kernels.checks import DISTANCES, Logits, check_name, check_settings, check_tensors

REDUCTIONS = ("mean", "sum", "none")


def fused_kd_loss(
    student_logits: Logits,
    teacher_logits: Logits | None,
    start_positions: Tensor,
    end_positions: Tensor,
    *,
    temperature: float = 1.0,
    distillation_loss_weight: float = 0.5,
    distillation_loss: str = "kl_div",
    convention: str = "haystack",
    mask: Tensor | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """w T^2 soft + (1 - w) hard, for w = distillation_loss_weight and T = temperature.

    student_logits, teacher_logits: one (B, L, 2) tensor or a (start, end) pair of (B, L) tensors;
        fp16, bf16, fp32 or fp64, any strides; the two may differ in type and in form. The teacher
        may be None where distillation_loss_weight is 0.
    start_positions, end_positions: (B,) int64 or int32. One outside [0, L) (-100, say) or masked
        out adds no hard term.
    temperature, distillation_loss_weight: Python floats, > 0 and in [0, 1].
    mask: (B, L) bool, True where a position takes part in both softmaxes. The others get gradient
        exactly 0 and their values, NaN included, never matter. A row where none takes part has
        loss 0 and gradient 0.
    distillation_loss, convention: the soft term of a window with logits S and C of the teacher.
        "kl_div", "haystack": sum over start and end of KL(softmax(C/T) || softmax(S/T))
        "kl_div", "hf":       the mean of the two
        "mse":                the mean of the two heads' mean over positions of ((S - C)/T)^2
        The hard term is the mean of the cross-entropies of start and end, without a temperature.
        Where C is -inf its probability is 0 and the position adds 0 to either soft term.
    reduction: "mean" divides by B, always (B = 0: NaN, as in torch); "sum"; "none" returns (B,).
    backend: None chooses by the tensor: "native" where it is built for the device, else "triton"
        on a GPU, else "reference", the plain-PyTorch specification. `python -m kdfast.doctor` says
        which are usable. All may be compiled by torch.compile and run under autocast; only
        "reference" can be differentiated twice and runs inside torch.func transforms.

    On a GPU it is two launches, the rows and their sum, and one in backward; `kd_loss_rows` is one
    and one.

    Returns fp32, or fp64 for an fp64 student; the student's gradient has the student's dtype. A
    term of weight 0 is left out even where it is infinite. Other non-finite logits that take part
    give a non-finite loss, never an error.

    Raises ValueError: for a teacher that requires grad, for a backend that is not usable here,
        and for whatever is not as said above.

    Source: Haystack 1.26 ("haystack"), run_squad_w_distillation.py of HF's research ("hf").
    """
    check_name("reduction", reduction, REDUCTIONS)
    settings = check_settings(temperature, distillation_loss_weight, distillation_loss, convention)
    tensors = check_tensors(
        student_logits,
        teacher_logits,
        start_positions,
        end_positions,
        mask,
        distillation_loss_weight,
    )
    chosen = _choose(tensors.student, backend)
    if reduction == "none":
        return _rows(tensors, settings, chosen)[0].sum(1)
    divisor = tensors.student.shape[0] if reduction == "mean" else 1
    if chosen == "reference" or is_graph(tensors):
        return _rows(tensors, settings, chosen)[0].sum() / divisor
    return differentiable_rows(chosen, settings, divisor, *tensors)


def kd_loss_rows(
    student: Logits,
    teacher: Logits | None,
    start_positions: Tensor,
    end_positions: Tensor,
    *,
    temperature: float,
    distillation_loss_weight: float,
    distillation_loss: str,
    convention: str,
    mask: Tensor | None,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """(row_loss (B, 2), row_parts (B, 2, 2)) of the arguments of `fused_kd_loss`.

    row_loss[b, head], head 0 for start and 1 for end: already weighted, so that the loss of a
        window is row_loss[b].sum() and "mean" is row_loss.sum() / B.
    row_parts[b, head]: the soft part, with its T^2, and the hard part, neither weighted; detached.
        row_loss = w soft + (1 - w) hard. Without a teacher the soft part is 0.

    Both are fp32, or fp64 for an fp64 student. Raises ValueError as `fused_kd_loss` does.
    """
    settings = check_settings(temperature, distillation_loss_weight, distillation_loss, convention)
    tensors = check_tensors(
        student, teacher, start_positions, end_positions, mask, distillation_loss_weight
    )
    return _rows(tensors, settings, _choose(tensors.student, backend))


class FusedKDLoss(nn.Module):
    """`fused_kd_loss` with its settings kept: the same keyword arguments, the mask per call."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        distillation_loss_weight: float = 0.5,
        distillation_loss: str = "kl_div",
        convention: str = "haystack",
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_settings(temperature, distillation_loss_weight, distillation_loss, convention)
        check_name("reduction", reduction, REDUCTIONS)
        self.temperature = temperature
        self.distillation_loss_weight = distillation_loss_weight
        self.distillation_loss = distillation_loss
        self.convention = convention
        self.reduction = reduction
        self.backend = backend

    def forward(
        self,
        student_logits: Logits,
        teacher_logits: Logits | None,
        start_positions: Tensor,
        end_positions: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        return fused_kd_loss(
            student_logits,
            teacher_logits,
            start_positions,
            end_positions,
            temperature=self.temperature,
            distillation_loss_weight=self.distillation_loss_weight,
            distillation_loss=self.distillation_loss,
            convention=self.convention,
            mask=mask,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, "
            f"distillation_loss_weight={self.distillation_loss_weight}, "
            f"distillation_loss={self.distillation_loss!r}, convention={self.convention!r}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )


def _choose(student: Tensor, backend: str | None) -> str:
    """The name of the backend that computes the rows."""
    if torch.compiler.is_compiling():
        return choose_while_tracing(student.device, student.dtype, backend)
    chosen = choose(student, backend)
    if chosen != "reference" and torch._C._are_functorch_transforms_active():
        raise RuntimeError(NO_TRANSFORMS)
    return chosen


def _rows(tensors: RowTensors, settings: RowSettings, chosen: str) -> tuple[Tensor, Tensor]:
    """row_loss and row_parts."""
    student, student_end, teacher, teacher_end, start_positions, end_positions, mask = tensors
    if chosen == "reference":
        return reference.kd_loss_rows(
            student if student_end is None else (student, student_end),
            teacher if teacher is None or teacher_end is None else (teacher, teacher_end),
            start_positions,
            end_positions,
            temperature=settings.temperature,
            distillation_loss_weight=settings.weight,
            distillation_loss=DISTANCES[settings.kind],
            convention="haystack" if settings.soft_scale == 1 else "hf",
            mask=mask,
        )
    if is_graph(tensors):
        row_loss, row_stats = rows_of_graph(tensors, settings, chosen)
    else:
        row_loss, row_stats = differentiable_rows(chosen, settings, None, *tensors)
    return row_loss, row_stats[..., SOFT : HARD + 1]
