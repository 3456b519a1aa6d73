"""A device that is not there: tensors say that they are on it, and compute on the CPU.

It refuses what a GPU refuses, an operation on tensors of two devices, and counts how often the program
waits for a number from the device. No library asks whether it is real.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

COPIES = {"aten::copy_", "aten::_to_copy", "aten::to", "aten::set_"}
"""What may cross from one device to the other."""
READS = {"__bool__", "__float__", "__int__", "__index__", "__format__", "__repr__", "item", "tolist"}
"""Methods that bring a number to the program."""
WHOLE = {"contiguous", "nonzero", "scaled_dot_product_attention"}
"""Functions whose inner parts ask for the device's own kernels: they run on the CPU as one."""
WAITS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"}


class MixedDevicesError(Exception):
    """An operation met tensors of the device and of the CPU."""


class OnDevice(torch.Tensor):
    """A tensor that says it is on the pretended device; `held` has its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, real: torch.Tensor, device: torch.device) -> OnDevice:
        wrapped = torch.Tensor._make_wrapper_subclass(
            cls, real.shape, strides=real.stride(), dtype=real.dtype, device=device
        )
        wrapped.held = real
        return wrapped

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if func is torch.Tensor.data.__get__:
            return OnDevice(args[0].held, args[0].device)
        if func is torch.Tensor.data.__set__:
            if not (isinstance(args[0], OnDevice) and isinstance(args[1], OnDevice)):
                raise MixedDevicesError("data of another device")
            args[0].held = args[1].held
            return None
        if name in READS:
            Device.now.waits.append(name)
            return func(args[0].held, *args[1:], **kwargs)
        if name in ("__getitem__", "__setitem__"):
            return _index(func, args)
        if name in WHOLE:
            if name == "nonzero":
                Device.now.waits.append(name)
            flat, spec = tree_flatten((args, kwargs))
            _check(name, flat)
            plain, named = tree_unflatten(_real(flat), spec)
            return OnDevice(func(*plain, **named), args[0].device)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Device.now.run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """While it is active, `device` exists."""

    now: Device

    def __init__(self, device: str) -> None:
        super().__init__()
        # With this key torch does not try to start the device.
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        self.device = torch.device(device)
        self.waits: list[str] = []
        """What made the program wait for the device."""
        self.dtypes: set[torch.dtype] = set()
        """Of all tensors that were on the device."""

    def __enter__(self) -> Any:
        Device.now = self
        self._lift = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=...) comes to us
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lift)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation: checked, computed on the CPU, its results put where they belong."""
        name = func._schema.name
        flat, spec = tree_flatten((args, kwargs))
        if name not in COPIES:
            _check(name, flat)
        plain, named = tree_unflatten(_real(flat), spec)
        actual = func(*plain, **named)
        ours = [item for item in flat if isinstance(item, OnDevice)]
        if name in WAITS:
            self.waits += [name] if ours else []
            return actual
        target = next((item for item in flat if isinstance(item, torch.device)), None)
        here = bool(ours) if target is None else target.type == self.device.type
        if name == "aten::copy_":
            here = isinstance(args[0], OnDevice)
        return tree_map_only(torch.Tensor, lambda t: self._put(t, ours), actual) if here else actual

    def _put(self, real: torch.Tensor, ours: Sequence[OnDevice]) -> OnDevice:
        self.dtypes.add(real.dtype)
        for wrapper in ours:  # what worked in place gives back its own tensor
            if wrapper.held is real:
                return wrapper
        return OnDevice(real, self.device)


def _real(flat: Sequence[Any]) -> list[Any]:
    cpu = torch.device("cpu")
    return [
        item.held if isinstance(item, OnDevice) else cpu if isinstance(item, torch.device) else item
        for item in flat
    ]


def _check(name: str, flat: Sequence[Any]) -> None:
    """Single numbers of the CPU may take part; tensors may not, but for indices."""
    tensors = [item for item in flat if isinstance(item, torch.Tensor)]
    strangers = [t for t in tensors if not isinstance(t, OnDevice) and t.dim() > 0]
    ours = any(isinstance(t, OnDevice) for t in tensors)
    if ours and strangers and not name.startswith("aten::index"):
        raise MixedDevicesError(f"{name} of the device and a CPU tensor {tuple(strangers[0].shape)}")


def _index(func: Any, args: Sequence[Any]) -> Any:
    me, where, *value = args
    plain = tree_map_only(OnDevice, lambda t: t.held, (where, value))
    if isinstance(me, OnDevice):
        if value and isinstance(value[0], torch.Tensor) and value[0].dim() > 0:
            _check("assignment", [me, value[0]])
        actual = func(me.held, plain[0], *plain[1])
        return OnDevice(actual, me.device) if isinstance(actual, torch.Tensor) else actual
    if isinstance(where, OnDevice) and where.dim() == 0 and not where.is_floating_point():
        Device.now.waits.append("index")
        return func(me, plain[0], *plain[1])
    raise MixedDevicesError(f"a tensor {tuple(me.shape)} of the CPU, indexed by one of the device")


@contextmanager
def pretended(device: str) -> Iterator[Device]:
    """Let `device` (with its number, as `cuda:0`) exist; no gradients, no inference mode."""
    was = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    inference, torch.inference_mode = torch.inference_mode, torch.no_grad  # it hides views from us
    try:
        with torch.no_grad(), Device(device) as mode:
            yield mode
    finally:
        torch.inference_mode = inference
        torch.__future__.set_overwrite_module_params_on_conversion(was)
