"""Streams, events and the functions below torch.cuda, for devices that are pretended."""

import contextlib
import itertools
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils import _foreach_utils

from tests.pretended import build
from tests.pretended.tensor import PretendedTensor

CUDA = 1  # the number of the device type


class Queue:
    """The downloads of one stream that nobody has waited for, in their order."""

    def __init__(self):
        self.sent = 0
        self.waiting = []  # (number, where it arrives, what arrives)
        self.seen = {}  # of other streams that this one waited for: queue -> number

    def sends(self, target, numbers):
        """A download begins: until it is waited for, NaN (or nonsense) stands in `target`."""
        self.sent += 1
        target.fill_(float("nan") if target.is_floating_point() else 77)
        self.waiting.append((self.sent, target, numbers))

    def now(self):
        """What has been queued so far, here and in streams that this one waits for."""
        return {**self.seen, self: self.sent}

    def arrives(self, number):
        """All downloads up to `number` are there."""
        for sent, target, numbers in self.waiting:
            if sent <= number:
                with torch.inference_mode(target.is_inference()):  # else it may not be changed
                    target.copy_(numbers)
        self.waiting = [each for each in self.waiting if each[0] > number]


def finish(work):
    """The host has waited for `work`, what Queue.now gave."""
    for queue, number in work.items():
        queue.arrives(number)


def make_stream_and_event(device):
    """torch.cuda.Stream and torch.cuda.Event of a Device."""
    library, numbers = build.load(), itertools.count(1)

    class Stream(torch.Stream):
        def __new__(cls, device_=None, priority=0, *, device=None, **ids):
            if not ids:
                given = device_ if device_ is not None else device
                index = torch.cuda._utils._get_device_index(given, optional=True)
                ids = {"stream_id": next(numbers), "device_index": index, "device_type": CUDA}
            return super().__new__(cls, **ids)

        cuda_stream = 0

        @property
        def queue(self):
            return device.card(self.device).queues[self.stream_id]

        def synchronize(self):
            device.wait("Stream.synchronize")
            finish(self.queue.now())

        def record_event(self, event=None):
            event = Event() if event is None else event
            event.record(self)
            return event

        def wait_event(self, event):
            self.queue.seen.update(event.work)

        def wait_stream(self, stream):
            self.queue.seen.update(stream.queue.now())

        def query(self):
            return not self.queue.waiting

    class Event:
        def __init__(self, enable_timing=False, blocking=False, interprocess=False):
            self.work = {}

        def record(self, stream=None):
            """On `stream`, or the current stream of the current device."""
            self.work = (torch.cuda.current_stream() if stream is None else stream).queue.now()

        def synchronize(self):
            device.wait("Event.synchronize")
            finish(self.work)

        def wait(self, stream=None):
            (torch.cuda.current_stream() if stream is None else stream).wait_event(self)

        def query(self):
            finish(self.work)
            return True

        def elapsed_time(self, other):
            return 1.0

    def current(index):
        return library.pretended_stream(index), index, CUDA

    def synchronize():
        device.wait("synchronize")
        for queue in device.cards[library.pretended_device()].queues.values():
            finish(queue.now())

    below = {
        "_cuda_getDevice": library.pretended_device,
        "_cuda_setDevice": library.pretended_exchange_device,
        "_cuda_getCurrentStream": current,
        "_cuda_getDefaultStream": lambda index: (0, index, CUDA),
        "_cuda_setStream": lambda stream_id, device_index, device_type: (
            library.pretended_set_stream(device_index, stream_id)
        ),
        "_cuda_synchronize": synchronize,
    }
    return Stream, Event, below


def patches(device):
    """What is put in the place of torch's own, as mock's context managers."""
    library = build.load()
    Stream, Event, below = make_stream_and_event(device)
    properties = SimpleNamespace(
        name=device.name,
        major=device.capability[0],
        minor=device.capability[1],
        total_memory=device.total_bytes,
        multi_processor_count=80,
    )
    below |= {
        "_cuda_memoryStats": lambda index: device.cards[index].memory_stats(),
        "_cuda_resetPeakMemoryStats": lambda index: device.cards[index].reset_peak(),
        "_cuda_emptyCache": lambda: device.calls.update(["empty_cache"]),
        "_cuda_set_sync_debug_mode": lambda mode: setattr(device, "sync_debug_mode", mode),
        "_cuda_get_sync_debug_mode": lambda: device.sync_debug_mode,
    }
    above = {
        "is_available": lambda: True,
        "device_count": lambda: len(device.cards),
        "_initialized": True,
        "_exchange_device": library.pretended_exchange_device,
        "_maybe_exchange_device": library.pretended_exchange_device,
        "_get_device_properties": lambda index: properties,
        "get_arch_list": lambda: ["sm_70", "sm_80", "sm_90"],
        "default_generators": tuple(card.generator for card in device.cards),
        "Stream": Stream,
        "Event": Event,
        "mem_get_info": lambda which=None: device.card(which).mem_get_info(),
    }
    for name, value in below.items():
        yield mock.patch.object(torch._C, name, value, create=True)
    for name, value in above.items():
        yield mock.patch.object(torch.cuda, name, value, create=True)
    # What seeds the generators has this function by its name.
    yield mock.patch.object(torch.cuda.random, "device_count", above["device_count"])
    types = [*_foreach_utils._foreach_supported_types, PretendedTensor]
    yield mock.patch.object(_foreach_utils, "_foreach_supported_types", types)
    yield _switches()


@contextlib.contextmanager
def _switches():
    # Module.to exchanges parameters: it cannot give a CPU tensor another kind of memory.
    torch.__future__.set_swap_module_params_on_conversion(True)
    # torch.tensor makes its result on the CPU and copies it by an operation that can be seen.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
        torch._C._set_only_lift_cpu_tensors(False)
