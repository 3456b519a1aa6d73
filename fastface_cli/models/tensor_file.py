"""The layout of a safetensors file, and writing one without holding it in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]

_NAMES = {
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_ORDER = list(_NAMES)  # the format stores wider types first, and these in this order


@dataclass(frozen=True)
class TensorLayout:
    """One checkpoint file: name to (shape, dtype), and the metadata of its header (None: none)."""

    tensors: Mapping[str, tuple[Shape, torch.dtype]]
    metadata: Mapping[str, str] | None = None

    @property
    def nbytes(self) -> int:
        """Return the total bytes of all tensors."""
        return sum(nbytes_of(shape, dtype) for shape, dtype in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Return the number of parameters of all tensors."""
        return sum(numel(shape) for shape, _ in self.tensors.values())

    def cast(self, dtype: torch.dtype) -> TensorLayout:
        """Return the layout with another data type for floating-point tensors."""
        return replace(
            self,
            tensors={
                name: (shape, dtype if old.is_floating_point else old)
                for name, (shape, old) in self.tensors.items()
            },
        )


def numel(shape: Shape) -> int:
    return int(torch.Size(shape).numel())


def nbytes_of(shape: Shape, dtype: torch.dtype) -> int:
    return numel(shape) * dtype.itemsize


def ordered(layout: TensorLayout) -> list[tuple[str, Shape, torch.dtype]]:
    """Return the tensors in the order of the file: wider types first, then by name."""
    items = [(name, shape, dtype) for name, (shape, dtype) in layout.tensors.items()]
    return sorted(items, key=lambda item: (-_ORDER.index(item[2]), item[0].encode()))


def safetensors_header(layout: TensorLayout) -> bytes:
    """Return the start of the file: the header length, then the header as JSON, padded to 8 bytes."""
    header: dict[str, Any] = {}
    if layout.metadata is not None:
        header["__metadata__"] = dict(layout.metadata)
    offset = 0
    for name, shape, dtype in ordered(layout):
        end = offset + nbytes_of(shape, dtype)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def safetensors_length(layout: TensorLayout) -> int:
    """Return the bytes of the complete file."""
    return len(safetensors_header(layout)) + layout.nbytes


def safetensors_pieces(layout: TensorLayout, tensor: Callable[[str], Tensor]) -> Iterator[memoryview]:
    """Yield the file piece by piece, so that only one tensor is in memory at a time.

    Args:
        layout: layout of the file.
        tensor: returns the tensor of a name, on the CPU, with the layout's shape and data type.
    """
    yield memoryview(safetensors_header(layout))
    for name, _, _ in ordered(layout):
        yield tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy().data
