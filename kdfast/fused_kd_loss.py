"""The distillation loss of extractive question answering: function, module, and the lower door."""

import math

import torch
from torch import Tensor, nn

from kdfast.backends import choose

Logits = Tensor | tuple[Tensor, Tensor]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    backend: None chooses by the tensor; "reference" is the plain-PyTorch specification.

    Returns fp32, or fp64 for an fp64 student; the student's gradient has the student's dtype. A
    term of weight 0 is left out even where it is infinite. Other non-finite logits that take part
    give a non-finite loss, never an error.

    Raises ValueError: for a teacher that requires grad, and for whatever is not as said above.

    Source: Haystack 1.26 ("haystack"), run_squad_w_distillation.py of HF's research ("hf").
    """
    _check_name("reduction", reduction, ("mean", "sum", "none"))
    row_loss, _ = kd_loss_rows(
        student_logits,
        teacher_logits,
        start_positions,
        end_positions,
        temperature=temperature,
        distillation_loss_weight=distillation_loss_weight,
        distillation_loss=distillation_loss,
        convention=convention,
        mask=mask,
        backend=backend,
    )
    if reduction == "none":
        return row_loss.sum(1)
    total = row_loss.sum()
    return total / row_loss.shape[0] if reduction == "mean" else total


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
    _check_settings(temperature, distillation_loss_weight, distillation_loss, convention)
    first = _check_logits("student", student)
    shape = tuple(first.shape[:2])
    if shape[1] == 0:
        raise ValueError("the student's logits have L = 0 positions, expected at least one")
    if teacher is not None:
        _check_teacher(teacher, first)
    elif distillation_loss_weight > 0:
        raise ValueError(
            f"teacher logits are None with distillation_loss_weight {distillation_loss_weight}, "
            "expected logits, or weight 0 to train on positions alone"
        )
    for name, positions in (("start_positions", start_positions), ("end_positions", end_positions)):
        _check_beside(name, positions, (torch.int64, torch.int32), shape[:1], first)
    if mask is not None:
        _check_beside("mask", mask, (torch.bool,), shape, first)
    return choose(first, backend).kd_loss_rows(
        student,
        teacher,
        start_positions,
        end_positions,
        temperature=temperature,
        distillation_loss_weight=distillation_loss_weight,
        distillation_loss=distillation_loss,
        convention=convention,
        mask=mask,
    )


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
        _check_settings(temperature, distillation_loss_weight, distillation_loss, convention)
        _check_name("reduction", reduction, ("mean", "sum", "none"))
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


def _check_name(argument: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ValueError(f"{argument} is {given!r}, expected one of {', '.join(map(repr, known))}")


def _check_settings(
    temperature: float, distillation_loss_weight: float, distillation_loss: str, convention: str
) -> None:
    for argument, given in (
        ("temperature", temperature),
        ("distillation_loss_weight", distillation_loss_weight),
    ):
        # A tensor would have to be read, which makes the host wait for the device.
        if not isinstance(given, (float, int)):
            raise ValueError(f"{argument} is a {type(given).__name__}, expected a Python float")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}, expected a finite number above 0")
    if not 0 <= distillation_loss_weight <= 1:
        raise ValueError(
            f"distillation_loss_weight is {distillation_loss_weight}, expected 0 to 1 inclusive"
        )
    _check_name("distillation_loss", distillation_loss, ("kl_div", "mse"))
    _check_name("convention", convention, ("haystack", "hf"))


def _check_logits(whose: str, logits: Logits) -> Tensor:
    """The first tensor of the logits, whose first two dimensions are (B, L)."""
    form = "expected one (B, L, 2) tensor or a (start, end) pair of (B, L) tensors"
    is_pair = isinstance(logits, (tuple, list))
    tensors = logits if is_pair else (logits,)
    if len(tensors) != (2 if is_pair else 1) or not all(isinstance(t, Tensor) for t in tensors):
        kinds = ", ".join(type(tensor).__name__ for tensor in tensors)
        raise ValueError(f"the {whose}'s logits are {f'({kinds})' if is_pair else kinds}, {form}")
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
            what = "a nested tensor" if tensor.is_nested else f"{tensor.layout} on {tensor.device}"
            raise ValueError(f"the {whose}'s logits are {what}, expected dense tensors with data")
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"the {whose}'s logits are {tensor.dtype}, expected float16, bfloat16, float32 "
                "or float64"
            )
    first, last = tensors[0], tensors[-1]
    one = not is_pair and first.dim() == 3 and first.shape[2] == 2
    two = is_pair and first.dim() == 2 and first.shape == last.shape
    if not (one or two):
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ValueError(f"the {whose}'s logits have shape {shapes}, {form}")
    if first.dtype != last.dtype or first.device != last.device:
        raise ValueError(
            f"the {whose}'s start logits are {first.dtype} on {first.device} and its end logits "
            f"{last.dtype} on {last.device}, expected the same for both"
        )
    return first


def _check_teacher(teacher: Logits, student: Tensor) -> None:
    first = _check_logits("teacher", teacher)
    if first.shape[:2] != student.shape[:2]:
        raise ValueError(
            f"the teacher's logits have (B, L) = {tuple(first.shape[:2])}, expected the student's "
            f"{tuple(student.shape[:2])}"
        )
    if first.device != student.device:
        raise ValueError(
            f"the teacher's logits are on {first.device}, expected the student's {student.device}"
        )
    if any(logits.requires_grad for logits in ((first,) if first is teacher else teacher)):
        raise ValueError(
            "the teacher's logits require grad, expected logits computed under torch.no_grad() "
            "or detached"
        )


def _check_beside(
    argument: str,
    given: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    student: Tensor,
) -> None:
    """A tensor that stands beside the student's logits: its dtype, shape, layout and device."""
    is_tensor = isinstance(given, Tensor)
    if not is_tensor or given.dtype not in dtypes or given.shape != shape:
        what = f"{given.dtype} of shape {tuple(given.shape)}" if is_tensor else type(given).__name__
        raise ValueError(
            f"{argument} is {what}, expected {' or '.join(map(str, dtypes))} of shape {shape}"
        )
    if given.layout != torch.strided:
        raise ValueError(f"{argument} is {given.layout}, expected a dense tensor")
    if given.device != student.device:
        raise ValueError(
            f"{argument} is on {given.device}, expected the student's {student.device}"
        )
