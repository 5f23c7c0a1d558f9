"""The CUDA device that the trials run on: a real card, or the pretended one with the same face."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


class Card:
    """A real card.

    Attributes:
        device: It.
        sizes: Of the models, so large that their activations are more than the allocator's blocks.
        articles: Of the data; each has two windows.
    """

    articles = 60

    def __init__(self) -> None:
        self.sizes = {"hidden_size": 256, "intermediate_size": 1024, "layers": 4}
        self.device = torch.device("cuda", torch.cuda.current_device())

    @contextlib.contextmanager
    def refusing_reads(self) -> Iterator[None]:
        """An operation for which the host would wait raises RuntimeError inside."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """The most memory that work() has beyond what is allocated before it."""
        torch.cuda.reset_peak_memory_stats(self.device)
        held = torch.cuda.memory_allocated(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - held

    @contextlib.contextmanager
    def limited_to(self, more: int) -> Iterator[None]:
        """Only `more` bytes beyond what is held now can be taken; mem_get_info does not tell."""
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(self.device).total_memory
        most = torch.cuda.memory_reserved(self.device) + more
        torch.cuda.set_per_process_memory_fraction(most / total, self.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    def times_run_out(self) -> int:
        """How often this process has run out of the card's memory."""
        return torch.cuda.memory_stats(self.device)["num_ooms"]

    @contextlib.contextmanager
    def launches(self) -> Iterator[Counter]:
        """Counts the kernels that run inside, by name; full when it ends."""
        found: Counter = Counter()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            yield found
            torch.cuda.synchronize(self.device)
        for event in profiler.events():
            if event.device_type == DeviceType.CUDA and not event.name.startswith("Mem"):
                found[event.name] += 1


class PretendedCard(Card):
    """The same of a `tests.pretended.device.Device`, for the code inside its context."""

    articles = 8

    def __init__(self, device) -> None:
        super().__init__()
        self.sizes = {}
        self.of = device
        device.run_out = mock.Mock(side_effect=device.run_out)

    @contextlib.contextmanager
    def limited_to(self, more: int) -> Iterator[None]:
        told, before = torch.cuda.mem_get_info(self.device), self.of.free_bytes
        self.of.free_bytes = torch.cuda.memory_allocated(self.device) + more
        with mock.patch("torch.cuda.mem_get_info", lambda device=None: told):
            yield
        self.of.free_bytes = before

    def times_run_out(self) -> int:
        return self.of.run_out.call_count

    @contextlib.contextmanager
    def launches(self) -> Iterator[Counter]:
        found, before = Counter(), self.of.launches.copy()
        yield found
        found.update(self.of.launches - before)
