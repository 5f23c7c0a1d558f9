"""Distillation in the Hugging Face Trainer, for those whose training lives there.

Needs accelerate, as the Trainer does. The loss is kdfast's, the teacher's logits come from kdfast's
cache, and a step has the same gradient however it is accumulated or spread over devices.
"""

from kdfast.hf.dataset import KDCollator, KDDataset, kd_dataset, kd_tokenizer
from kdfast.hf.trainer import KDMixin, KDTrainer

__all__ = ["KDCollator", "KDDataset", "KDMixin", "KDTrainer", "kd_dataset", "kd_tokenizer"]
