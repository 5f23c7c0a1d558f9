"""Windows as tensors on the device, made so that the device never waits for the host.

On a CPU a micro-batch is gathered from the mapped files when it is its turn. On a GPU everything is
uploaded once, where it fits, and a micro-batch is a gather there; where it does not fit, a thread
fills pinned buffers one step ahead.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from kdfast.common.device import free_bytes
from kdfast.data.windows import Windows
from kdfast.models.packing import PackedWindows, packed_length
from kdfast.tokenizers.encode import ragged

# Of a GPU's free memory, what the uploaded data may take.
RESIDENT_SHARE = 0.25


@dataclass(frozen=True)
class MicroBatch:
    """n windows padded to the longest of them, or packed, on the device.

    inputs: the arguments of SpanModel, whose logits are (n, L, 2) either way. mask: bool (n, L),
    the real tokens, or None where all are. start_positions, end_positions: int64 (n,).
    teacher_logits: fp16 (n, L, 2), or None.
    """

    inputs: dict[str, Any]
    mask: torch.Tensor | None
    start_positions: torch.Tensor
    end_positions: torch.Tensor
    teacher_logits: torch.Tensor | None


class WindowLoader(Protocol):
    """Gives the micro-batches of a step in their order."""

    def micro_batches(self, cuts: list[np.ndarray]) -> Iterator[MicroBatch]:
        """One micro-batch for each array of window numbers."""

    def expect(self, cuts: list[np.ndarray]) -> None:
        """Say what will be asked for next, so that it may be made ready."""


@dataclass(frozen=True)
class Layout:
    """How micro-batches are laid out.

    multiple: of which the width of padded windows is one, or the length of packed ones. packs:
    windows stand one behind the other, instead of in padded rows.
    """

    multiple: int = 1
    packs: bool = False

    def tokens(self, lengths: np.ndarray) -> int:
        """The tokens of a micro-batch of windows of these lengths, with padding or filling."""
        if self.packs:
            return packed_length(lengths, self.multiple)
        return len(lengths) * padded_width(lengths, self.multiple)

    def laid_out(
        self, batch: "MicroBatch", lengths: np.ndarray, on_device: torch.Tensor
    ) -> "MicroBatch":
        """A padded batch as it should be. lengths, on_device: of its windows, int64 (n,)."""
        if not self.packs:
            return batch
        width = batch.inputs["input_ids"].shape[1]
        packed = PackedWindows.of(lengths, on_device, width, self.multiple)
        inputs = {
            name: None if batch.inputs[name] is None else packed.pack(batch.inputs[name])
            for name in ("input_ids", "token_type_ids")
        }
        return replace(batch, inputs=inputs | {"packed": packed})


PADDED = Layout()


def make_loader(
    windows: Windows,
    teacher_logits: np.ndarray | None,
    device: torch.device,
    layout: Layout = PADDED,
    reserved: int = 0,
) -> WindowLoader:
    """The loader that suits the device and the size of the data.

    teacher_logits: fp16 (tokens, 2), flat as windows.input_ids, or None. reserved: bytes on the
    device that the run is still to take for other things than micro-batches.
    """
    host = HostLoader(windows, teacher_logits, layout)
    if device.type == "cpu":
        return host
    needed = ResidentLoader.bytes_needed(windows, teacher_logits)
    if needed < RESIDENT_SHARE * (free_bytes(device) - reserved):
        return ResidentLoader(windows, teacher_logits, device, layout)
    return StreamedLoader(host, device)


class HostLoader:
    """Micro-batches in the host's memory, from arrays that may be memory-mapped."""

    def __init__(
        self, windows: Windows, teacher_logits: np.ndarray | None, layout: Layout = PADDED
    ):
        self.windows = windows
        self.teacher_logits = teacher_logits
        self.layout = layout

    def micro_batches(self, cuts: list[np.ndarray]) -> Iterator[MicroBatch]:
        return map(self.micro_batch, cuts)

    def expect(self, cuts: list[np.ndarray]) -> None:
        """A CPU has nothing to do it with."""

    def micro_batch(self, indices: np.ndarray) -> MicroBatch:
        windows = self.windows
        lengths = windows.lengths[indices]
        width = padded_width(lengths, self.layout.multiple)
        padded = windows.padded(indices, width)
        mask = torch.from_numpy(padded["attention_mask"]) if lengths.min() < width else None
        teacher = None
        if self.teacher_logits is not None:
            rows = np.zeros((len(indices), width, 2), dtype=np.float16)
            rows[padded["attention_mask"]] = self.teacher_logits[flat_positions(windows, indices)]
            teacher = torch.from_numpy(rows)
        types = torch.from_numpy(padded["token_type_ids"]) if windows.uses_token_types else None
        batch = MicroBatch(
            inputs={
                "input_ids": torch.from_numpy(padded["input_ids"]),
                "attention_mask": mask,
                "token_type_ids": types,
            },
            mask=mask,
            start_positions=torch.from_numpy(windows.start_positions[indices].astype(np.int64)),
            end_positions=torch.from_numpy(windows.end_positions[indices].astype(np.int64)),
            teacher_logits=teacher,
        )
        return self.layout.laid_out(batch, lengths, torch.from_numpy(lengths.astype(np.int64)))


class ResidentLoader:
    """Everything on the device, uploaded once; the host sends the numbers of the windows alone."""

    def __init__(
        self,
        windows: Windows,
        teacher_logits: np.ndarray | None,
        device: torch.device,
        layout: Layout = PADDED,
    ):
        def upload(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
            return torch.from_numpy(np.array(array)).to(device, dtype)

        self.lengths = np.array(windows.lengths)
        self.layout = layout
        self.device = device
        self.pad_token_id = windows.pad_token_id
        self.ids = upload(windows.input_ids, torch.int32)
        self.begin = upload(windows.window_start[:-1], torch.int64)
        self.length = upload(windows.lengths, torch.int64)
        self.start = upload(windows.start_positions, torch.int64)
        self.end = upload(windows.end_positions, torch.int64)
        self.prefix = upload(windows.prefix, torch.int64) if windows.uses_token_types else None
        self.teacher = None if teacher_logits is None else upload(teacher_logits, torch.float16)

    @staticmethod
    def bytes_needed(windows: Windows, teacher_logits: np.ndarray | None) -> int:
        """Bytes on the device."""
        per_token = 4 if teacher_logits is None else 8
        return per_token * int(windows.window_start[-1]) + 40 * len(windows)

    def micro_batches(self, cuts: list[np.ndarray]) -> Iterator[MicroBatch]:
        """One copy to the device for the whole step."""
        if not cuts:
            return
        numbers = torch.from_numpy(np.concatenate(cuts).astype(np.int64))
        if self.device.type == "cuda":
            numbers = numbers.pin_memory()
        numbers = numbers.to(self.device, non_blocking=True)
        for indices, chosen in zip(cuts, numbers.split([len(cut) for cut in cuts]), strict=True):
            yield self._gather(chosen, self.lengths[indices])

    def expect(self, cuts: list[np.ndarray]) -> None:
        """All is there already."""

    def _gather(self, chosen: torch.Tensor, lengths: np.ndarray) -> MicroBatch:
        """chosen: int64 (n,) on the device; lengths: int (n,) on the host, of the same windows."""
        width = padded_width(lengths, self.layout.multiple)
        position = torch.arange(width, device=self.device)
        real = position < self.length[chosen, None]
        place = torch.where(real, self.begin[chosen, None] + position, 0)
        ids = torch.where(real, self.ids[place], self.pad_token_id).long()
        types = None
        if self.prefix is not None:
            types = (real & (position >= self.prefix[chosen, None])).long()
        mask = real if lengths.min() < width else None
        teacher = None
        if self.teacher is not None:
            teacher = torch.where(real[..., None], self.teacher[place], 0)
        batch = MicroBatch(
            inputs={"input_ids": ids, "attention_mask": mask, "token_type_ids": types},
            mask=mask,
            start_positions=self.start[chosen],
            end_positions=self.end[chosen],
            teacher_logits=teacher,
        )
        return self.layout.laid_out(batch, lengths, self.length[chosen])


class StreamedLoader:
    """Micro-batches that a thread gathers and pins while the device computes."""

    def __init__(self, host: HostLoader, device: torch.device):
        self.host = host
        self.device = device
        self._thread = ThreadPoolExecutor(1)
        self._expected: list[tuple[np.ndarray, Future[MicroBatch]]] = []

    def expect(self, cuts: list[np.ndarray]) -> None:
        for _, waiting in self._expected:
            waiting.cancel()
        self._expected = [(cut, self._thread.submit(self._pinned, cut)) for cut in cuts]

    def micro_batches(self, cuts: list[np.ndarray]) -> Iterator[MicroBatch]:
        if not _same(cuts, [cut for cut, _ in self._expected]):
            self.expect(cuts)
        ready, self._expected = self._expected, []
        return (self._sent(future.result()) for _, future in ready)

    def _sent(self, batch: MicroBatch) -> MicroBatch:
        return map_tensors(batch, lambda tensor: tensor.to(self.device, non_blocking=True))

    def _pinned(self, indices: np.ndarray) -> MicroBatch:
        batch = self.host.micro_batch(indices)
        return map_tensors(batch, torch.Tensor.pin_memory) if self.device.type == "cuda" else batch


def _same(cuts: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return len(cuts) == len(others) and all(map(np.array_equal, cuts, others))


def map_tensors(batch: MicroBatch, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
    """The batch with every tensor changed; mask and attention_mask stay one."""

    def changed(value: Any) -> Any:
        if isinstance(value, PackedWindows):
            return value.map(change)
        return None if value is None else change(value)

    mask = changed(batch.mask)
    inputs = {
        name: mask if name == "attention_mask" else changed(value)
        for name, value in batch.inputs.items()
    }
    return replace(
        batch,
        inputs=inputs,
        mask=mask,
        start_positions=change(batch.start_positions),
        end_positions=change(batch.end_positions),
        teacher_logits=changed(batch.teacher_logits),
    )


def padded_width(lengths: np.ndarray, multiple: int) -> int:
    """The width of a micro-batch of windows of these lengths."""
    return -(-int(lengths.max()) // multiple) * multiple


def flat_positions(windows: Windows, indices: np.ndarray) -> np.ndarray:
    """Positions in the flat arrays of all tokens of the windows `indices`, window after window."""
    return ragged(windows.window_start[indices], windows.lengths[indices])
