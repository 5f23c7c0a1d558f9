"""AdamW with fp16's loss scale and its schedule; a step whose gradient is not finite is skipped."""

import math

import torch
from torch import nn

# A loss scale below this would make gradients smaller than they are.
SCALE_FLOOR = 1.0


def learning_rate(peak: float, updates: int, total: int, warmup_ratio: float) -> float:
    """Linear from 0 over int(warmup_ratio * total) updates, then linear to 0 at `total`.

    updates: updates made so far, so that the first one has rate 0 (Haystack's LinearWarmup).
    """
    warmup = int(warmup_ratio * total)
    if updates < warmup:
        return peak * updates / warmup
    return peak * max(0, total - updates) / max(1, total - warmup)


class ScaledAdamW:
    """Fused AdamW (betas 0.9 and 0.999, eps 1e-8; decay on every parameter) behind a GradScaler.

    Everything happens on the device, without a wait of the host.

    Args:
        model: What trains is all of it that is not frozen.
        weight_decay: AdamW's.
        scaler: For fp16; None: the loss is not scaled.

    Attributes:
        named: Name -> parameter that trains, in the model's order.
        adamw: torch's optimizer.
        updates: Steps that reached the weights. They drive the learning rate.
        overflows: Consecutive overflows of the scaler since the last update.
    """

    def __init__(
        self, model: nn.Module, weight_decay: float, scaler: torch.amp.GradScaler | None = None
    ):
        self.named = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.parameters = list(self.named.values())
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=0.0,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=weight_decay,
            fused=True,
        )
        self.scaler = scaler
        self.updates = 0
        self.overflows = 0
        if scaler is not None:
            # The scaler makes its state at the first loss, and a rank may have none in a step.
            scaler.scale(torch.zeros(1, device=self.parameters[0].device))

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the loss scale, to call backward() of."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def loss_scale(self) -> torch.Tensor:
        """The present scale, an fp32 scalar on the device; 1.0 without a scaler."""
        return self.scale(torch.ones((), device=self.parameters[0].device))

    def zero_grad(self) -> None:
        """Forget the gradients, and the memory they held."""
        self.adamw.zero_grad(set_to_none=True)
        if self.parameters[0].is_cuda:
            torch.cuda.empty_cache()

    def unscale(self) -> None:
        """Divide the gradients by the loss scale."""
        if self.scaler is not None:
            self.scaler.unscale_(self.adamw)

    def clip(self, max_norm: float) -> torch.Tensor:
        """Clip the gradients; returns their norm before, an fp32 scalar on the device."""
        gradients = [each.grad for each in self.parameters if each.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, max_norm, norm)
        return norm

    def step(self, rate: float, skip: torch.Tensor) -> None:
        """One step with learning rate `rate`; gradients are set to None.

        Where skip, a bool scalar on the device, is True, weights and Adam's state stay as they are.
        """
        for group in self.adamw.param_groups:
            group["lr"] = rate
        # Fused AdamW leaves everything as it is where found_inf is 1, without a read by the host.
        self.adamw.__dict__["found_inf"] = skip.float()
        self.adamw.step()
        del self.adamw.__dict__["found_inf"]
        self.adamw.zero_grad(set_to_none=True)

    def count(self, loss: float, norm: float, scale: float) -> None:
        """Count a step that was made or skipped, and let the scaler learn from it.

        A loss that is not finite is no fault of the scale, which stays; and an overflow lowers it
        to SCALE_FLOOR at most.
        """
        if self.scaler is not None:
            self.scaler.update()
        if math.isfinite(loss) and math.isfinite(norm):
            self.updates += 1
            self.overflows = 0
        elif self.scaler is not None and not math.isfinite(loss):
            self.scaler.update(scale)
        elif self.scaler is not None:
            self.overflows += 1
            if scale * self.scaler.get_backoff_factor() < SCALE_FLOOR:
                self.scaler.update(SCALE_FLOOR)
