"""AdamW, its schedule, and the update that a bad gradient never reaches."""

import math

import torch
from torch import nn

# A loss scale below this would make gradients smaller than they are.
SCALE_FLOOR = 1.0


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Fused AdamW (betas 0.9 and 0.999, eps 1e-8) with weight decay on all that trains."""
    return torch.optim.AdamW(
        trained(model).values(),
        lr=0.0,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=weight_decay,
        fused=True,
    )


def learning_rate(peak: float, updates: int, total: int, warmup_ratio: float) -> float:
    """Linear from 0 over int(warmup_ratio * total) updates, then linear to 0 at `total`.

    updates: updates made so far, so that the first one has rate 0 (Haystack's LinearWarmup).
    """
    warmup = int(warmup_ratio * total)
    if updates < warmup:
        return peak * updates / warmup
    return peak * max(0, total - updates) / max(1, total - warmup)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of those that are not frozen."""
    return {name: each for name, each in model.named_parameters() if each.requires_grad}


class Updater:
    """Unscale, clip, and step, all on the device.

    model: what trains is all of it that is not frozen, `named` in its order. scaler: a GradScaler
    for fp16, else None. `updates` counts the steps that reached the weights: it drives the rate,
    as Adam's own count does its bias correction. `overflows` counts the overflows of the scaler
    since the last of them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.AdamW,
        scaler: torch.amp.GradScaler | None,
        max_grad_norm: float,
    ):
        self.named = trained(model)
        self.parameters = list(self.named.values())
        self.optimizer = optimizer
        self.scaler = scaler
        self.max_grad_norm = max_grad_norm
        self.updates = 0
        self.overflows = 0
        if scaler is not None:
            # The scaler makes its state at the first loss, and a rank may have none in a step.
            scaler.scale(torch.zeros(1, device=self.parameters[0].device))

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of `loss`, scaled where there is a scaler."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def drop(self) -> None:
        """Forget the gradients of a step that could not be completed, and the memory they held."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.parameters[0].is_cuda:
            torch.cuda.empty_cache()

    def update(
        self, rate: float, loss: torch.Tensor, dropped: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One optimizer step with learning rate `rate`, and gradients set to None.

        loss: scalar on the device, the step's own. dropped: bool scalar on the device, True where
        the gradients are not to be used.
        Returns (norm, skipped, scale), fp32 scalars on the device: the norm before clipping; 1.0
        where it or the loss is not finite or the step dropped, in which case weights and Adam's
        state stay as they were; and the loss scale of the step, 1.0 without a scaler. Unless the
        step was dropped, finish() completes it.
        """
        scale = torch.ones((), device=loss.device)
        if self.scaler is not None:
            scale = self.scaler.scale(scale)
            self.scaler.unscale_(self.optimizer)
        gradients = [each.grad for each in self.parameters if each.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        skipped = 1.0 - (torch.isfinite(norm) & torch.isfinite(loss)).float()
        if dropped is not None:
            skipped = torch.maximum(skipped, dropped.float())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Fused AdamW leaves everything as it is where found_inf is 1, without a read by the host.
        self.optimizer.found_inf = skipped
        self.optimizer.step()
        del self.optimizer.found_inf
        self.optimizer.zero_grad(set_to_none=True)
        return norm, skipped, scale

    def finish(self, loss: float, norm: float, scale: float) -> None:
        """Count a step that update() has made or skipped, and let the scaler learn from it.

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
