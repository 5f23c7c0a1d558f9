"""csrc/kd_rows_cuda.cu built for the CPU with fiber_cuda.h, and called with torch tensors."""

import ctypes
import subprocess
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SOURCE = CSRC / "kd_rows_cuda.cu"
SOURCES = (SOURCE, *sorted(CSRC.glob("kd_cuda_*.h")))

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
TYPE_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}
STATS = 8

Two = ctypes.c_int64 * 2
TwoPointers = ctypes.c_void_p * 2


class Logits(ctypes.Structure):
    _fields_ = [
        ("head", TwoPointers),
        ("stride_b", Two),
        ("stride_l", Two),
        ("type", ctypes.c_int),
    ]


class Rows(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("student", Logits),
        ("teacher", Logits),
        ("mask", ctypes.c_void_p),
        ("mask_stride_b", ctypes.c_int64),
        ("mask_stride_l", ctypes.c_int64),
        ("target", TwoPointers),
        ("target_stride", Two),
        ("target_bytes", ctypes.c_int * 2),
        ("temperature", ctypes.c_double),
        ("weight", ctypes.c_double),
        ("soft_scale", ctypes.c_double),
        ("kind", ctypes.c_int),
        ("divisor", ctypes.c_double),
    ]


class ForwardOut(ctypes.Structure):
    _fields_ = [("row_loss", ctypes.c_void_p), ("row_stats", ctypes.c_void_p)]


class BackwardArgs(ctypes.Structure):
    _fields_ = [
        ("row_stats", ctypes.c_void_p),
        ("grad_row_loss", ctypes.c_void_p),
        ("grad_row_loss_stride_b", ctypes.c_int64),
        ("grad_row_loss_stride_h", ctypes.c_int64),
        ("grad", TwoPointers),
        ("grad_stride_b", Two),
        ("grad_stride_l", Two),
    ]


def build(
    folder: Path,
    *,
    change: tuple[str, str] | None = None,
    types: str = "",
    flags: tuple[str, ...] = (),
) -> Path:
    """The shared library of the emulated rows, in `folder`.

    change: a text of the sources, and what stands there instead. types: the element types to
    build, "f16 f32" for example; all of them without. Raises RuntimeError with what the compiler
    said.
    """
    library = folder / "rows.so"
    flags = (*flags, *prepare(folder, change, types))
    compile_cpp(HERE / "rows_driver.cpp", library, flags)
    return library


def prepare(folder: Path, change: tuple[str, str] | None, types: str) -> tuple[str, ...]:
    """Fills `folder` with headers, and sources if one is changed; the flags to compile there."""
    folder.mkdir(parents=True, exist_ok=True)
    for header in ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h"):
        (folder / header).write_text('#include "fiber_cuda.h"\n')
    if change is not None:
        texts = {source: source.read_text() for source in SOURCES}
        places = [source for source, text in texts.items() if change[0] in text]
        if not places:
            raise ValueError(f"the CUDA sources hold no {change[0]!r} any more")
        texts[places[0]] = texts[places[0]].replace(*change, 1)
        for source, text in texts.items():
            (folder / source.name).write_text(text)
    flags = ("-DKDFAST_CUDA", f"-I{folder}")
    if types:
        flags = (*flags, "-DKD_TYPES(X)=" + " ".join(f"X({name})" for name in types.split()))
    return flags


def compile_cpp(source: Path, output: Path, flags: tuple[str, ...], *, shared: bool = True) -> None:
    """A shared library, or a program. Raises RuntimeError with what the compiler said."""
    # A variable that is read before it is written shall not happen to be 0.
    command = ["g++", "-std=c++17", "-O1", "-g1", "-ftrivial-auto-var-init=pattern"]
    command += ["-fPIC", "-shared"] if shared else []
    command += ["-Wno-unknown-pragmas", *flags, f"-I{HERE}", f"-I{CSRC}"]
    done = subprocess.run(
        [*command, str(source), "-o", str(output)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)


class Emulator:
    """The functions of one built library. `seed` draws the order of threads, warps and blocks."""

    def __init__(self, library: Path) -> None:
        self.lib = ctypes.CDLL(str(library))
        for name in ("fiber_forward", "fiber_backward", "fiber_why_not"):
            getattr(self.lib, name).restype = ctypes.c_char_p

    def forward(
        self,
        student: Tensor | tuple[Tensor, Tensor],
        teacher: Tensor | tuple[Tensor, Tensor] | None,
        targets: tuple[Tensor, Tensor],
        mask: Tensor | None,
        *,
        seed: int = 0,
        device: int = 0,
        stream: int = 0,
        **settings,
    ) -> tuple[Tensor, Tensor]:
        """row_loss (B, 2), row_stats (B, 2, 8). Raises RuntimeError for a failed launch."""
        rows = rows_of(student, teacher, targets, mask, **settings)
        # Poisoned: what a kernel forgets to write is NaN.
        row_loss = torch.full((rows.batch, 2), torch.nan, dtype=sum_type(student))
        row_stats = torch.full((rows.batch, 2, STATS), torch.nan, dtype=sum_type(student))
        out = ForwardOut(row_loss.data_ptr(), row_stats.data_ptr())
        self._run(self.lib.fiber_forward, rows, out, seed, device, stream)
        return row_loss, row_stats

    def backward(
        self,
        grad_row_loss: Tensor,
        student: Tensor | tuple[Tensor, Tensor],
        teacher: Tensor | tuple[Tensor, Tensor] | None,
        targets: tuple[Tensor, Tensor],
        mask: Tensor | None,
        row_stats: Tensor,
        *,
        seed: int = 0,
        device: int = 0,
        stream: int = 0,
        **settings,
    ) -> Tensor:
        """The gradient (B, L, 2), in memory as the student's form has it."""
        rows = rows_of(student, teacher, targets, mask, **settings)
        first = heads(student)[0]
        if isinstance(student, Tensor):
            grad = torch.full((*first.shape, 2), torch.nan, dtype=first.dtype)
        else:
            pair = [torch.full(first.shape, torch.nan, dtype=first.dtype) for _ in range(2)]
            grad = tuple(pair)
        parts = heads(grad)
        args = BackwardArgs(
            row_stats.data_ptr(),
            grad_row_loss.data_ptr(),
            *grad_row_loss.stride(),
            TwoPointers(*(part.data_ptr() for part in parts)),
            Two(*(part.stride(0) for part in parts)),
            Two(*(part.stride(1) for part in parts)),
        )
        self._run(self.lib.fiber_backward, rows, args, seed, device, stream)
        return torch.stack(parts, 2)

    def why_not(self, device: int) -> str | None:
        sentence = self.lib.fiber_why_not(device)
        return sentence and sentence.decode()

    def last_launch(self) -> dict[str, int]:
        five = (ctypes.c_uint64 * 5)()
        self.lib.fiber_launch(five)
        names = ("device", "stream", "blocks", "threads", "launches")
        return dict(zip(names, five, strict=True))

    def traffic(self) -> tuple[dict[int, int], dict[int, int]]:
        """Bytes loaded, and stored, by width of the access, since the last question."""
        loads, stores = (ctypes.c_uint64 * 17)(), (ctypes.c_uint64 * 17)()
        self.lib.fiber_traffic(loads, stores)
        return tuple({w: n for w, n in enumerate(found) if n} for found in (loads, stores))

    def _run(self, function, rows, out, seed, device, stream) -> None:
        self.lib.fiber_seed(ctypes.c_uint64(seed))
        problem = function(
            ctypes.byref(rows), ctypes.byref(out), device, ctypes.c_void_p(stream or None)
        )
        if problem is not None:
            raise RuntimeError(problem.decode())


def heads(logits: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return logits.unbind(2) if isinstance(logits, Tensor) else logits


def sum_type(student: Tensor | tuple[Tensor, Tensor]) -> torch.dtype:
    return torch.float64 if heads(student)[0].dtype == torch.float64 else torch.float32


def rows_of(
    student, teacher, targets, mask, *, temperature, weight, kind, soft_scale, divisor=1
) -> Rows:
    rows = Rows(batch=heads(student)[0].shape[0], length=heads(student)[0].shape[1])
    rows.student = _logits(student)
    rows.teacher = Logits() if teacher is None else _logits(teacher)
    if mask is not None:
        rows.mask, (rows.mask_stride_b, rows.mask_stride_l) = mask.data_ptr(), mask.stride()
    rows.target = TwoPointers(*(target.data_ptr() for target in targets))
    rows.target_stride = Two(*(target.stride(0) for target in targets))
    rows.target_bytes = (ctypes.c_int * 2)(*(target.element_size() for target in targets))
    rows.temperature, rows.weight, rows.soft_scale = temperature, weight, soft_scale
    rows.kind, rows.divisor = kind, divisor
    return rows


def _logits(logits: Tensor | tuple[Tensor, Tensor]) -> Logits:
    parts = heads(logits)
    return Logits(
        TwoPointers(*(part.data_ptr() for part in parts)),
        Two(*(part.stride(0) for part in parts)),
        Two(*(part.stride(1) for part in parts)),
        TYPES[parts[0].dtype],
    )
