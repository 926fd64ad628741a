"""A stand-in for an Apple GPU. Importing it makes tensors on the device "mps" CPU tensors that refuse what MPS lacks.

Refused: float64; the operators in LACKING; pinned memory; copies to the device that do not wait; bfloat16 autocast, as
before macOS 14; operators on tensors of both devices.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# those that are used here; the first three have no kernel in torch 2.13 (torch.testing._internal.common_mps)
LACKING = {"special_ndtri", "linalg_eigh", "linalg_svdvals", "_fused_adamw_", "numpy", "__array__"}
MIXED = {"copy_", "__get__", "__set__", "__getitem__", "__setitem__", "_has_compatible_shallow_copy_type"}  # take both


def is_mps(device):
    return device is not None and torch.device(device).type == "mps"


def marked(t):
    return "on_mps" in t.__dict__


def mark(t):
    assert t.dtype != torch.float64, "MPS has no float64"
    t.__dict__["on_mps"] = True
    return t


def device_of(t):
    return torch.device("mps", 0) if marked(t) else t.device


class AppleGPU(TorchFunctionMode):
    """Marks tensors that are made on MPS, moved to it or computed from one that is."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_mps = any(map(marked, tensors))
        if func == torch.Tensor.device.__get__:
            return device_of(args[0])
        if name in ("to", "cpu"):
            return move(*args, **kwargs) if name == "to" else move(*args, "cpu")
        assert name != "pin_memory" and not (on_mps and name in LACKING), f"MPS has no {name}"
        if on_mps and name not in MIXED:
            assert all(marked(t) or not t.ndim for t in tensors), f"{name} of tensors on mps and cpu"
        if kwargs.get("device") is not None:
            on_mps = is_mps(kwargs["device"])
            kwargs = kwargs | {"device": "cpu" if on_mps else kwargs["device"]}
        out = func(*args, **kwargs)
        if func == torch.Tensor.data.__set__ and marked(args[1]):
            mark(args[0])
        for t in tree_leaves(out):
            if on_mps and isinstance(t, torch.Tensor):
                mark(t)
        return out


def move(t, *args, device=None, dtype=None, non_blocking=False, copy=False, memory_format=torch.preserve_format):
    """Tensor.to."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            device, dtype = device_of(arg), arg.dtype
        elif isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, bool):
            non_blocking = arg
        elif arg is not None:
            device = arg
    device = device_of(t) if device is None else torch.device(device)
    assert not (is_mps(device) and non_blocking), "a copy to mps that does not wait"
    copy = copy or marked(t) != is_mps(device)
    out = t.to("cpu" if is_mps(device) else device, dtype or t.dtype, copy=copy, memory_format=memory_format)
    return mark(out) if is_mps(device) else out


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu" if is_mps(device) else device)


class Autocast(torch.autocast):
    def __new__(cls, device_type, *args, enabled=True, **options):
        assert device_type != "mps" or not enabled, "bfloat16 on mps needs macOS 14"
        return contextlib.nullcontext() if device_type == "mps" else super().__new__(cls)


def new_parameter(cls, data=None, requires_grad=True, new=torch.nn.Parameter.__new__):
    parameter = new(cls, data, requires_grad)
    return mark(parameter) if data is not None and marked(data) else parameter


torch.backends.mps.is_available, torch.backends.mps.is_macos_or_newer = lambda: True, lambda *version: False
torch.Generator, torch.autocast, torch.nn.Parameter.__new__ = Generator, Autocast, new_parameter
AppleGPU().__enter__()
