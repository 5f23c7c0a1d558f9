"""A Hugging Face Trainer whose loss is kdfast's."""

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from kdfast.common.errors import UserError
from kdfast.config import TrainConfig
from kdfast.fused_kd_loss import fused_kd_loss
from kdfast.hf.dataset import TEACHER_COLUMNS, KDCollator, KDDataset, kd_parts

LABELS = ("start_positions", "end_positions")
if TYPE_CHECKING:  # what KDMixin stands before
    Base = Trainer
else:
    Base = object


class KDMixin(Base):
    """Put before a Trainer class: `class KDTrainer(KDMixin, Trainer)`.

    kd: the settings of the loss: temperature, distillation_loss_weight, distillation_loss and
    convention. train_dataset: a KDDataset, parts of some (Subset, ConcatDataset), or rows with
    their columns. data_collator: gets rows without the teacher's columns (see KDCollator).

    Evaluation and prediction need no teacher: the loss of rows without teacher_logits is that of
    their answers alone. The model returns start_logits and end_logits, in a dict or as the first
    two of a tuple; it never sees the answers.

    The Trainer divides a loss by the number of accumulated batches, of which the last may be
    short, and averages over devices: a mean of means. Here each loss is the sum over its windows,
    divided by the windows of the whole step on all devices.

    Raises UserError for compute_loss_func and label_smoothing_factor, which have no part in it.
    """

    # What compute_loss returns is divided already: the Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, kd: TrainConfig, **kwargs: Any):
        self.kd = kd
        collate = kwargs.get("data_collator", args[2] if len(args) > 2 else None)
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None:
            raise UserError(
                "KDTrainer's loss is kdfast's: leave compute_loss_func out, or override "
                "compute_loss in a subclass."
            )
        if self.args.label_smoothing_factor != 0:
            raise UserError(
                f"label_smoothing_factor is {self.args.label_smoothing_factor}, which kdfast's "
                "loss does not have: leave it at 0, the teacher's distribution is soft already."
            )
        self.model_accepts_loss_kwargs = True  # versions without loss_is_scaled_for_ga ask this
        if self.args.label_names is None:  # a model's forward need not name them
            self.label_names = list(LABELS)
        parts = [*kd_parts(self.train_dataset), *kd_parts(self.eval_dataset)]
        for part in parts:
            check_temperature(part.temperature, kd)
        if not isinstance(collate, KDCollator):
            self.data_collator = KDCollator(self._pad_token_id(parts), collate)

    def _pad_token_id(self, parts: list[KDDataset]) -> int:
        pads = {part.pad_token_id for part in parts}
        if len(pads) > 1:
            raise UserError(
                f"The datasets pad with the tokens {sorted(pads)}: make them for one student."
            )
        config = getattr(self.model, "config", None)
        others = (getattr(each, "pad_token_id", None) for each in (self.processing_class, config))
        return next((pad for pad in chain(pads, others) if pad is not None), 0)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        assert self._signature_columns is not None
        for name in TEACHER_COLUMNS:
            if name not in self._signature_columns:
                self._signature_columns.append(name)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The batches of one optimizer step, and the number of its windows on all devices."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(len(batch["input_ids"]) for batch in batches)
        count = self.accelerator.gather(torch.tensor([count], device=device)).sum()
        return batches, count

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if any(inputs.get(name) is None for name in self.label_names):
            inputs = {k: v for k, v in inputs.items() if k not in TEACHER_COLUMNS}
        return super().prediction_step(model, inputs, *args, **kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The batch's part of the step's loss, or its own mean where there is no step."""
        inputs = dict(inputs)
        teacher, _ = (inputs.pop(name, None) for name in TEACHER_COLUMNS)
        positions = [inputs.pop(name, None) for name in LABELS]
        weight = self.kd.loss.distillation_loss_weight
        if teacher is None:
            if weight > 0 and torch.is_grad_enabled():
                raise UserError(
                    "KDTrainer got a batch without teacher_logits to train on: train on "
                    "kdfast.hf.kd_dataset, or keep its columns in your rows."
                )
            weight = 0.0
        if any(each is None for each in positions):
            raise UserError(
                "KDTrainer got a batch without start_positions or end_positions: keep these "
                "columns in your rows and in your data_collator."
            )
        outputs = model(**inputs)
        mask = inputs.get("attention_mask")
        loss = fused_kd_loss(
            heads_of(outputs),
            teacher,
            *positions,
            temperature=self.kd.loss.temperature,
            distillation_loss_weight=weight,
            distillation_loss=self.kd.loss.distillation_loss,
            convention=self.kd.loss.convention,
            mask=None if mask is None else mask.bool(),
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        if num_items_in_batch is not None:
            # DistributedDataParallel averages gradients over the processes.
            loss = loss / num_items_in_batch * self.accelerator.num_processes
        if isinstance(outputs, tuple):
            outputs = loss, *outputs  # as a model does that is given the answers
        return (loss, outputs) if return_outputs else loss


class KDTrainer(KDMixin, Trainer):
    """The Hugging Face Trainer with kdfast's loss."""


def heads_of(outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The start and end logits of what a model returned."""
    if isinstance(outputs, tuple) and len(outputs) > 1:
        return outputs[0], outputs[1]
    if isinstance(outputs, Mapping) and {"start_logits", "end_logits"} <= outputs.keys():
        return outputs["start_logits"], outputs["end_logits"]
    has = f" with {', '.join(outputs)}" if isinstance(outputs, Mapping) else ""
    raise UserError(
        f"The model returned a {type(outputs).__name__}{has}, expected start_logits and "
        "end_logits: take an AutoModelForQuestionAnswering, or return a dict with these."
    )


def check_temperature(temperature: float | None, kd: TrainConfig) -> None:
    """Raise UserError where logits that hold at `temperature` alone would be used otherwise."""
    if temperature is not None and (kd.loss.temperature, kd.loss.distillation_loss) != (
        temperature,
        "kl_div",
    ):
        raise UserError(
            f"The rows hold distributions of teachers at temperature {temperature:g}: give "
            "KDTrainer that temperature and kl_div, or make the rows again."
        )
