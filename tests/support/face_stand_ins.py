"""Stand-ins for face models: a detector that sees drawn faces, and small ONNX files of every kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fastface_cli.identity.analyzer import Face

POINTS = np.array([[38, 52], [74, 52], [56, 72], [42, 92], [71, 92]], np.float32) / 112
"""Key points of a face box of side 1, as ArcFace places them."""
CELL = (32, 7, 5)
"""Stride, column and row of the cell in which the stand-in for YuNet sees a face."""


def person(number: int, likeness: float = 1.0, of: int = 0) -> np.ndarray:
    """The unit-norm embedding of a person; below 1, at that cosine from person `of` and new in the rest."""

    def unit(seed: int) -> np.ndarray:
        vector = np.random.default_rng(seed).standard_normal(512)
        return vector / np.linalg.norm(vector)

    if likeness == 1.0:
        return unit(number).astype(np.float32)
    base, new = unit(of), unit(number)
    new -= (new @ base) * base
    new /= np.linalg.norm(new)
    return (likeness * base + np.sqrt(1 - likeness**2) * new).astype(np.float32)


def drawn(size: tuple[int, int], *faces: tuple[int, int, int, int]) -> Image.Image:
    """A black picture with faces (left, top, side, number), drawn as squares of color (number, 255, 200)."""
    picture = Image.new("RGB", size)
    for left, top, side, number in faces:
        ImageDraw.Draw(picture).rectangle(
            (left, top, left + side - 1, top + side - 1), fill=(number, 255, 200)
        )
    return picture


@dataclass
class SquareAnalyzer:
    """Sees the squares of `drawn`, where `sees(size, shape, side over longest side)` says so."""

    sees: Callable[[int, tuple[int, int], float], bool] = lambda size, shape, share: True
    people: dict[int, np.ndarray] = field(default_factory=dict)
    score: dict[int, float] = field(default_factory=dict)
    asked: list[tuple[int, tuple[int, int]]] = field(default_factory=list)

    def detect(self, picture: np.ndarray, size: int) -> list[Face]:
        assert picture.dtype == np.uint8
        assert picture.flags["C_CONTIGUOUS"]
        shape = (picture.shape[0], picture.shape[1])
        self.asked.append((size, shape))
        faces = []
        for number in np.unique(picture[..., 2][picture[..., 1] > 250]):
            rows, columns = np.nonzero((picture[..., 1] > 250) & (picture[..., 2] == number))
            left, top = float(columns.min()), float(rows.min())
            right, bottom = float(columns.max() + 1), float(rows.max() + 1)
            if self.sees(size, shape, (right - left) / max(shape)):
                points = np.array([left, top]) + POINTS * np.array([right - left, bottom - top])
                score = self.score.get(int(number), 0.95)
                faces.append(Face((left, top, right, bottom), points.astype(np.float32), score))
        return faces

    def embed(self, picture: np.ndarray, face: Face) -> np.ndarray:
        middle = face.key_points.mean(axis=0).astype(int)
        number = int(picture[middle[1], middle[0], 2])
        return self.people.get(number, person(number))


def random_pack(folder: Path, *, width: int = 512, points: bool = True, certainty: float = 4.0) -> Path:
    """A tiny random detector in SCRFD's layout and a random recognizer, as ONNX files.

    Args:
        width: numbers in an embedding.
        points: whether the detector has key points.
        certainty: the logit of the score of the largest anchors; below 0 it sees no face.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    nodes, outputs, weights = [], [], []
    kinds = {"score": 1, "box": 4} | ({"points": 10} if points else {})
    for kind, channels in kinds.items():
        for stride in (8, 16, 32):
            name = f"{kind}{stride}"
            scale = 1e-3 if kind == "score" else 1e-2
            weight = (scale * random.standard_normal((2 * channels, 3, stride, stride))).astype(np.float32)
            bias = np.full(2 * channels, 2.0, np.float32)
            if kind == "score":
                bias[:] = certainty if stride == 32 else -8.0
            if kind == "points":
                bias = np.tile((4 * POINTS - 2).reshape(-1), 2).astype(np.float32)
            weights += [
                numpy_helper.from_array(weight, f"w.{name}"),
                numpy_helper.from_array(bias, f"b.{name}"),
                numpy_helper.from_array(np.array([-1, channels], np.int64), f"shape.{name}"),
            ]
            nodes += [
                helper.make_node(
                    "Conv", ["input", f"w.{name}", f"b.{name}"], [f"conv.{name}"], strides=[stride, stride]
                ),
                helper.make_node("Transpose", [f"conv.{name}"], [f"last.{name}"], perm=[0, 2, 3, 1]),
                helper.make_node("Reshape", [f"last.{name}", f"shape.{name}"], [f"flat.{name}"]),
                helper.make_node("Sigmoid" if kind == "score" else "Identity", [f"flat.{name}"], [name]),
            ]
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", channels]))
    picture = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, "h", "w"])
    detector = helper.make_graph(nodes, "detector", [picture], outputs, weights)
    weight = random.standard_normal((width, 3 * 7 * 7)).astype(np.float32)
    recognizer = helper.make_graph(
        [
            helper.make_node("AveragePool", ["input"], ["pooled"], kernel_shape=[16, 16], strides=[16, 16]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("Gemm", ["flat", "w"], ["embedding"], transB=1),
        ],
        "recognizer",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, 112, 112])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", width])],
        [numpy_helper.from_array(weight, "w")],
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, graph in (("det.onnx", detector), ("rec.onnx", recognizer)):
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.save(model, folder / name)
    return folder


def write_yunet(path: Path) -> None:
    """A file with YuNet's input and outputs that sees one face, around CELL, in every image."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    stride_of_face, column, row = CELL
    outputs, nodes, tensors = [], [], []
    for stride in (8, 16, 32):
        side = 640 // stride
        values = {
            "cls": np.zeros((1, side * side, 1), np.float32),
            "obj": np.zeros((1, side * side, 1), np.float32),
            "bbox": np.zeros((1, side * side, 4), np.float32),
            "kps": np.zeros((1, side * side, 10), np.float32),
        }
        if stride == stride_of_face:
            cell = row * side + column
            values["cls"][0, cell] = values["obj"][0, cell] = 0.95
            values["bbox"][0, cell] = [0.0, 0.0, np.log(6.0), np.log(6.0)]  # centered, 6 cells wide
            values["kps"][0, cell] = [-1, -1, 1, -1, 0, 0, -1, 1, 1, 1]
        for name, value in values.items():
            tensors.append(numpy_helper.from_array(value, f"v_{name}_{stride}"))
            nodes.append(helper.make_node("Add", [f"v_{name}_{stride}", "none"], [f"{name}_{stride}"]))
            outputs.append(helper.make_tensor_value_info(f"{name}_{stride}", TensorProto.FLOAT, value.shape))
    tensors.append(numpy_helper.from_array(np.zeros(1, np.float32), "zero"))
    nodes = [
        helper.make_node("GlobalAveragePool", ["input"], ["mean"]),
        helper.make_node("Slice", ["mean", "starts", "ends", "axes"], ["one"]),
        helper.make_node("Reshape", ["one", "shape"], ["flat"]),
        helper.make_node("Mul", ["flat", "zero"], ["none"]),
        *nodes,
    ]
    for name, numbers in (("starts", [0]), ("ends", [1]), ("axes", [1]), ("shape", [1])):
        tensors.append(numpy_helper.from_array(np.array(numbers, np.int64), name))
    entry = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 640, 640])
    graph = helper.make_graph(nodes, "yunet", [entry], outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path)


def write_parser(path: Path) -> None:
    """A stand-in for BiSeNet: red pixels are skin, all others background."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.zeros((19, 3, 1, 1), np.float32)
    weight[1, 0] = 1.0
    graph = helper.make_graph(
        [helper.make_node("Conv", ["input", "weight"], ["scores"])],
        "parser",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 512, 512])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 19, 512, 512])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(path))
