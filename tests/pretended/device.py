"""A pretended CUDA device: CUDA's rules, a CPU's numbers. See tests/README.md.

    with pretended(capability=(7, 0), free_bytes=2**30) as device:
        model.to("cuda:1")
        device.clear()
        ...
        assert not device.reads

It works in a process that loaded its library before torch: tests with the marker `pretended` run in
one, and so does what `process.run_pretended` and `python -m tests.pretended` call.
"""

import contextlib
import importlib
from collections import Counter, defaultdict
from unittest import mock

import torch

from tests.pretended import build
from tests.pretended.runtime import Queue, patches
from tests.pretended.tensor import Rules, place


class Card:
    """One GPU of the device: its memory, streams and generator."""

    def __init__(self, device, index):
        self.of = device
        self.device = torch.device("cuda", index)
        self.generator = torch.Generator()
        self.queues = defaultdict(Queue)
        self.allocated = self.peak = 0

    def stream(self):
        """The queue of the stream that is current in this thread."""
        return self.queues[build.load().pretended_stream(self.device.index)]

    def take(self, size):
        """Allocate `size` bytes, or give them back where it is negative."""
        if size > 0 and self.allocated + size > self.of.free_bytes:
            self.of.run_out(f"{size} bytes, {self.of.free_bytes - self.allocated} are free")
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    def mem_get_info(self):
        return self.of.free_bytes - self.allocated, self.of.total_bytes

    def memory_stats(self):
        return {"allocated_bytes": {"all": {"current": self.allocated, "peak": self.peak}}}

    def reset_peak(self):
        self.peak = self.allocated

    @contextlib.contextmanager
    def random(self):
        """Whatever draws from the CPU's generator draws from this card's instead."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.generator.get_state())
        try:
            yield
        finally:
            self.generator.set_state(torch.get_rng_state())
            torch.set_rng_state(before)


class Device:
    """What `pretended` gives.

    Attributes:
        launches: Operation -> kernels launched.
        reads: "what @ file:line" -> how often the host had to wait there for a value or a copy;
            what torch.cuda.set_sync_debug_mode reports.
        waits: "what @ file:line" -> calls that wait openly, such as Event.synchronize.
        copies: Direction and kind -> copies between host and device.
        calls: Name -> calls of functions that are noted, such as empty_cache.
        cards: One `Card` a GPU, with its allocated and peak bytes.
    """

    def __init__(self, capability, free_bytes, total_bytes, devices):
        self.capability = capability
        self.name = f"Pretended sm_{capability[0]}{capability[1]}"
        self.free_bytes, self.total_bytes = free_bytes, total_bytes
        self.launches, self.reads, self.waits = Counter(), Counter(), Counter()
        self.copies, self.calls = Counter(), Counter()
        self.sync_debug_mode = 0
        self.cards = [Card(self, index) for index in range(devices)]
        self._limits = []

    def clear(self):
        """Set all counters to zero."""
        for counter in (self.launches, self.reads, self.waits, self.copies, self.calls):
            counter.clear()

    def run_out_at(self, number, operation="embedding"):
        """Run out of memory at the `number`-th operation of that name from now, once.

        A forward pass of a reader begins with embeddings, one to three of them.
        """
        left = [number]

        def limit(name, args):
            if name == operation and left[0] > 0:
                left[0] -= 1
                return left[0] == 0
            return False

        self._limits.append(limit)

    def run_out_above(self, tokens):
        """Run out of memory in every forward pass over more than so many tokens."""

        def limit(name, args):
            # A narrow table holds no tokens but, in MPNet, a number for each head and distance;
            # and DeBERTa looks up distances, in a row.
            if name != "embedding" or args[0].shape[1] <= 4 or args[1].dim() < 2:
                return False
            return args[1].numel() > tokens

        self._limits.append(limit)

    def never_run_out(self):
        """Forget what `run_out_at` and `run_out_above` said."""
        self._limits.clear()

    def run_out(self, why):
        """What CUDA's allocator raises."""
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {why}.")

    def named(self, device):
        """A torch.device with its index: the current one where it has none."""
        device = torch.device(device) if device is not None else torch.device("cuda")
        if device.type == "cuda" and device.index is None:
            return torch.device("cuda", build.load().pretended_device())
        return device

    def card(self, device):
        """The Card of a device, of its number, or of the current one for None."""
        index = device if isinstance(device, int) else self.named(device).index
        if index >= len(self.cards):
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")
        return self.cards[index]

    # What the rules tell.

    def before(self, card, name, args):
        """An operation is about to run."""
        for limit in self._limits:
            if limit(name, args):
                self.run_out(f"what {name} needs")

    def read(self, card, what):
        """The host waits for the card's current stream."""
        self.reads[f"{what} @ {place()}"] += 1
        if self.sync_debug_mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        stream = card.stream()
        for queue, number in stream.now().items():
            queue.arrives(number)

    def wait(self, what):
        self.waits[f"{what} @ {place()}"] += 1


@contextlib.contextmanager
def pretended(capability=(7, 0), free_bytes=16 * 2**30, total_bytes=None, devices=2):
    """CUDA devices for the code inside, on which no other work is done; gives a `Device`.

    Args:
        capability: Of all devices. bf16 begins with (8, 0).
        free_bytes: Of each; what does not fit raises torch.OutOfMemoryError.
        total_bytes: What a device says that it has. Default: free_bytes.
        devices: How many.
    """
    importlib.import_module("torch._dynamo")  # by the first operation, it would meet the patches
    device = Device(capability, free_bytes, total_bytes or free_bytes, devices)
    library = build.load()
    library.pretended_configure(devices, capability >= (8, 0))
    torch._C._ensureCUDADeviceGuardSet()
    rules = Rules(device)
    with contextlib.ExitStack() as stack:
        for patch in patches(device):
            stack.enter_context(patch)
        stack.enter_context(_native_rows())
        # A card would be measured by products that take a CPU minutes.
        stack.enter_context(mock.patch("kdfast.training.results.matmul_rate", lambda *_: 1e14))
        stack.callback(library.pretended_exchange_device, library.pretended_exchange_device(0))
        Rules.active.append(rules)
        stack.callback(Rules.active.pop)
        stack.enter_context(rules)
        yield device


@contextlib.contextmanager
def _native_rows():
    """kdfast's compiled loss, as in a build with nvcc: its CPU rows compute what CUDA's would."""
    from kdfast import _C
    from kdfast.kernels import native

    native._why_not.cache_clear()
    _C.why_not_cuda = lambda index: None
    try:
        yield
    finally:
        del _C.why_not_cuda
        native._why_not.cache_clear()
