"""Files that can execute code when they are loaded: each reader refuses them, and nothing runs."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import fastface_cli
from fastface_cli.errors import ModelUnavailableError
from fastface_cli.evaluation.metrics.aesthetic import read_pickle
from fastface_cli.evaluation.scoring import load_vectors

PACKAGE = Path(fastface_cli.__file__).parent


class MakesFolder:
    """Creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return Path.mkdir, (self.folder,)  # type: ignore[return-value]


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    file, folder = tmp_path / "head.pth", tmp_path / "created"
    torch.save({"layers.0.weight": torch.zeros(2), "code": MakesFolder(folder)}, file)
    with pytest.raises(ModelUnavailableError, match=r"head\.pth does not load"):
        read_pickle(file, "the aesthetic predictor")
    assert not folder.exists()
    torch.load(file, weights_only=False)
    assert folder.is_dir(), "the file is harmless, so the test shows nothing"


def test_vectors_with_code_are_refused_and_do_not_run(tmp_path: Path) -> None:
    vectors, folder = tmp_path / "vectors/clip", tmp_path / "created"
    vectors.mkdir(parents=True)
    array = np.empty(1, object)
    array[0] = MakesFolder(folder)
    np.savez(vectors / "a.npz", **{"key\timage": array})
    assert load_vectors(tmp_path, ["clip"]) == {}, "treated as damaged"
    assert not folder.exists()
    with np.load(vectors / "a.npz", allow_pickle=True) as arrays:
        assert len(arrays["key\timage"]) == 1
    assert folder.is_dir(), "the file is harmless, so the test shows nothing"


def test_no_other_reader_can_execute_a_file() -> None:
    """A new `load` must be added to the tests above."""
    calls = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
    readers = []
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "dill", "joblib", "cloudpickle"} & set(names), path
            if isinstance(node, ast.Call) and ast.unparse(node.func) in calls:
                name, value = calls[ast.unparse(node.func)]
                options = {
                    keyword.arg: ast.literal_eval(keyword.value)
                    for keyword in node.keywords
                    if keyword.arg == name
                }
                assert options == {name: value}, f"{path}:{node.lineno}"
                readers.append(path.name)
    assert sorted(readers) == ["aesthetic.py", "pulid.py", "scoring.py"]
