"""A tensor on a pretended CUDA device, and the rules by which an operation runs on it."""

import re
import sys
from pathlib import Path
from typing import ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.pretended.attention import Attention

# What launches nothing, views apart.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_"}
FREE |= {"detach", "alias", "lift", "lift_fresh", "_unsafe_view", "_reshape_alias", "is_pinned"}
FREE |= {"is_same_size", "_local_scalar_dense", "record_stream"}
# What waits for the device, as its result's shape or value is needed on the host.
READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount"}
READS |= {"_unique", "_unique2", "unique_dim", "unique_consecutive"}
INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}
COPIES = {"_to_copy", "copy_", "_copy_from"}
# Half-precision products, which a card sums in fp32.
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "convolution", "convolution_backward"}
# What takes no scalar of the CPU among the device's tensors; elementwise operations do.
STRICT = {"cat", "stack", "gather", "scatter", "index_select", "embedding", *PRODUCTS}
HALF = (torch.float16, torch.bfloat16)
ON_CARD = re.compile(r"\bcuda:\d")
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


class Memory:
    """What a tensor and its views share: bytes that count until the last of them is gone."""

    def __init__(self, card, size):
        self.card, self.size = card, 0
        card.take(size)  # raises where there is not so much
        self.size = size

    def __del__(self):
        self.card.take(-self.size)


class PretendedTensor(torch.Tensor):
    """On "cuda:n" for whoever asks, autocast and autograd included; its numbers are `inner`."""

    @staticmethod
    def __new__(cls, inner, device, memory):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        self.inner, self.memory = inner, memory
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Rules.active[-1].run(func, args, kwargs or {})

    def numpy(self, *, force=False):
        if not force:
            raise TypeError(
                f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to "
                "copy the tensor to host memory first."
            )
        return self.detach().cpu().numpy()

    def __array__(self, dtype=None):
        return self.numpy()

    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    def storage(self):
        return self.inner.storage()

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self):
        return f"PretendedTensor({self.inner}, device='{self.device}')"


class Rules(TorchDispatchMode):
    """Runs each operation as CUDA would: refused, counted, its numbers computed on the CPU.

    device: the Device whose counters and cards it works on.
    """

    active: ClassVar[list["Rules"]] = []

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.attention = Attention(device.capability >= (8, 0)).table()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        name = func._schema.name.split("::")[-1]
        leaves = tree_leaves((args, kwargs))
        there = [each for each in leaves if isinstance(each, PretendedTensor)]
        target = next((each for each in leaves if isinstance(each, torch.device)), None)
        if not there and (target is None or target.type != "cuda"):
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled() and func.has_kernel_for_dispatch_key(COMPOSITE):
            with self:  # autograd, which inference mode leaves out, would have taken it apart
                return func.decompose(*args, **kwargs)
        if name in COPIES:
            return self._copy(func, name, args, kwargs)
        here = [
            each for each in leaves
            if isinstance(each, torch.Tensor) and not isinstance(each, PretendedTensor)
        ]  # fmt: skip
        self._refuse_mixing(func, name, there, here)
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"{func} would change the shape of a pretended tensor.")
        card = self.device.card(there[0].device if there else target)
        self._count(func, name, args, kwargs, there, here, card)
        out = self._compute(func, name, args, kwargs, card)
        if name == "_local_scalar_dense":
            return out
        return self._wrapped(out, there, card)

    def _refuse_mixing(self, func, name, there, here):
        devices = {each.device for each in there}
        devices |= {each.device for each in here if each.dim() > 0 or name in STRICT}
        if len(devices) > 1 and not (name in INDEXING and len({e.device for e in there}) == 1):
            found = " and ".join(sorted(map(str, devices)))
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, "
                f"{found}! ({func})"
            )

    def _count(self, func, name, args, kwargs, there, here, card):
        device = self.device
        device.before(card, name, args)
        if name in READS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            device.read(card, name)
        if name in INDEXING and there:
            masks = [e for e in tree_leaves(args[1]) if getattr(e, "dtype", None) is torch.bool]
            # A number put where a mask is True is a masked_fill_.
            is_fill = "put" in name and args[2].device.type == "cpu" and args[2].numel() == 1
            if masks and not is_fill:
                device.read(card, f"{name} with a mask")
            elif any(each.dim() for each in here):
                device.read(card, f"{name} with an index of the CPU")
        if name in self.attention:
            device.launches[name] += self.attention[name][1]
        elif name not in FREE and not func.is_view:
            device.launches[name] += 1

    def _compute(self, func, name, args, kwargs, card):
        args, kwargs = tree_map(_inner, (args, kwargs))
        kwargs.pop("pin_memory", None)
        if name in self.attention:
            with card.random():
                return self.attention[name][0](*args, **kwargs)
        if name in PRODUCTS:
            return _with_fp32_sums(func, args, kwargs)
        if name in ("_softmax", "_log_softmax") and args[2]:  # half_to_float
            return func(args[0].float(), args[1], False)
        if name in ("_softmax_backward_data", "_log_softmax_backward_data") and args[3] in HALF:
            return func(args[0].float(), args[1].float(), args[2], torch.float32).to(args[3])
        if torch.Tag.nondeterministic_seeded in func.tags:
            with card.random():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _copy(self, func, name, args, kwargs):
        """_to_copy and copy_: on one card, between two, to a card and from it."""
        device = self.device
        if name == "_to_copy":
            source, into, kwargs = args[0], None, dict(kwargs)
            wait = not kwargs.pop("non_blocking", False)
            target = kwargs.pop("device", None) or source.device
            kwargs.pop("pin_memory", None)
            target = device.named(target)
        else:
            into, source = args[:2]
            wait = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            target = into.device
        card = device.card(target if target.type == "cuda" else source.device)
        device.before(card, name, args)
        dtype = into.dtype if into is not None else kwargs.get("dtype") or source.dtype
        if source.device == target or dtype != source.dtype:
            device.launches[name] += 1
        numbers = _inner(source)
        out = func(numbers, **kwargs) if into is None else _inner(into)
        if source.device.type == "cpu":
            is_pinned = source.is_pinned()
            device.copies[f"to the device, {'pinned' if is_pinned else 'pageable'}"] += 1
            if wait and source.numel():
                device.read(card, "a copy to the device that waits")
        elif target.type == "cpu":
            device.copies["to the host"] += 1
            late = not wait and (into is None or into.is_pinned())
            if late:
                true = func(out, numbers) if into is not None else out.clone()
                card.stream().sends(out, true.clone() if into is not None else true)
                return out if into is None else into
            device.read(card, "a copy to the host")
        if into is not None:
            func(out, numbers)
            return into
        return self._wrapped(out, [], card) if target.type == "cuda" else out

    def _wrapped(self, out, there, card):
        """The results as tensors of the card; what an operation wrote into is returned itself."""
        own = {id(each.inner): each for each in there}
        memories = {each.inner.untyped_storage()._cdata: each.memory for each in there}

        def wrap(each):
            if not isinstance(each, torch.Tensor) or isinstance(each, PretendedTensor):
                return each
            if id(each) in own:
                return own[id(each)]
            storage = each.untyped_storage()
            memory = memories.get(storage._cdata)
            if memory is None:
                memory = memories[storage._cdata] = Memory(card, storage.nbytes())
            # A view that inference mode makes of an ordinary tensor is an ordinary one.
            with torch.inference_mode(each.is_inference()):
                return PretendedTensor(each, card.device, memory)

        return tree_map(wrap, out)


def _inner(each):
    """An argument of an operation as the CPU takes it."""
    if isinstance(each, PretendedTensor):
        return each.inner
    if isinstance(each, torch.device) and each.type == "cuda":
        return torch.device("cpu")
    # kdfast's loss checks in backward where its tensors are by their names.
    return ON_CARD.sub("cpu", each) if isinstance(each, str) else each


def _with_fp32_sums(func, args, kwargs):
    half = next((e.dtype for e in tree_leaves(args) if getattr(e, "dtype", None) in HALF), None)
    if half is None:
        return func(*args, **kwargs)
    wide = tree_map(lambda e: e.float() if isinstance(e, torch.Tensor) else e, args)
    out = func(*wide, **kwargs)
    return tree_map(lambda e: e.to(half) if isinstance(e, torch.Tensor) else e, out)


ROOT = f"{Path(__file__).parents[2]}/"
OURS = ("/torch/", "/tests/pretended/tensor.py", "/tests/pretended/device.py")
OURS += ("/tests/pretended/runtime.py", "contextlib.py")


def place() -> str:
    """file:line of the caller outside torch, or "backward" on autograd's own thread."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not any(part in name for part in OURS) and "threading" not in name:
            for above in ("site-packages/", ROOT):
                name = name.split(above)[-1]
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward"
