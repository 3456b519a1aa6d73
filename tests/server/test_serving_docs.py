"""The page on serving is true: the schema, the script and the Python example."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from support.doc_pages import ROOT, blocks
from support.served import PHOTO, Server


def test_the_schema_is_up_to_date():
    spec = importlib.util.spec_from_file_location("render_openapi", ROOT / "docs" / "render_openapi.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    message = "run python docs/render_openapi.py"
    assert (ROOT / "docs" / "openapi.json").read_text(encoding="utf-8") == script.render(), message


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_script_makes_an_image(server: Server, tmp_path: Path):
    script = ROOT / "examples" / "serve.sh"
    assert len(script.read_text().splitlines()) <= 20
    command = [str(script), str(PHOTO), "a watercolour portrait", str(tmp_path / "out.png")]
    environment = {**os.environ, "FASTFACE_URL": server.address}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("event: step") == 4
    assert Image.open(tmp_path / "out.png").size == (128, 128)


def test_the_python_example_runs(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copy(PHOTO, tmp_path / "me.jpg")
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in blocks("docs/serving.md") if block.language == "python"]
    names: dict[str, object] = {}
    exec(block.text.replace("http://127.0.0.1:8188", server.address), names)
    assert len(names["answer"].data) == 2
    assert len(names["saved"].data) == 1
