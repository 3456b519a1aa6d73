"""Names, atomic writing and contact sheets."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from fastface_cli import files
from fastface_cli.errors import FastFaceError, UsageError
from fastface_cli.output.images import LONGEST_SIDE, grid, plan_paths, write_image
from fastface_cli.output.latents import save_latents


def fields(count: int = 1, **values: Any) -> list[dict[str, Any]]:
    base = {"recipe": "hyper-fastface", "prompt": "an astronaut, reading", "scale": 0.8}
    return [{**base, "seed": 40 + index, **values} for index in range(count)]


def plan(output: str | None, count: int = 1, force: bool = False, **values: Any) -> list[str]:
    return [str(p) for p in plan_paths(output, count=count, fields=fields(count, **values), force=force)]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def small() -> Image.Image:
    return Image.new("RGB", (16, 16), (200, 10, 30))


class TestNames:
    def test_without_output(self) -> None:
        assert plan(None) == ["fastface-hyper-fastface-40.png"]
        assert plan(None, 2) == ["fastface-hyper-fastface-40.png", "fastface-hyper-fastface-41.png"]

    def test_automatic_names_step_aside_even_with_force(self) -> None:
        Path("fastface-hyper-fastface-40.png").touch()
        Path("fastface-hyper-fastface-40-1.png").touch()
        assert plan(None) == ["fastface-hyper-fastface-40-2.png"]
        assert plan(None, force=True) == ["fastface-hyper-fastface-40-2.png"]

    def test_automatic_names_of_a_sweep_differ(self) -> None:
        assert plan(None, 3, seed=7) == [
            "fastface-hyper-fastface-7.png",
            "fastface-hyper-fastface-7-1.png",
            "fastface-hyper-fastface-7-2.png",
        ]

    def test_folder(self, tmp_path: Path) -> None:
        (tmp_path / "here").mkdir()
        assert plan("here") == ["here/hyper-fastface-40.png"]
        assert plan("new/") == ["new/hyper-fastface-40.png"]
        assert plan("new") == ["new/hyper-fastface-40.png"]
        assert plan("face-0.8") == ["face-0.8/hyper-fastface-40.png"]
        assert plan("..") == ["../hyper-fastface-40.png"]
        assert plan("new/{recipe}/") == ["new/hyper-fastface/hyper-fastface-40.png"]
        assert not Path("new").exists()
        (tmp_path / "here" / "hyper-fastface-40.png").touch()
        assert plan("here") == ["here/hyper-fastface-40-1.png"]

    def test_file(self) -> None:
        assert plan("x.png") == ["x.png"]
        assert plan("a/x.PNG") == ["a/x.PNG"]
        assert plan("a/x.jpg") == ["a/x.jpg"]
        assert plan("x.png", 3) == ["x-1.png", "x-2.png", "x-3.png"]

    def test_home(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        assert plan("~/x.png") == [str(tmp_path / "x.png")]

    def test_template(self) -> None:
        assert plan("{recipe}-{seed}.png") == ["hyper-fastface-40.png"]
        assert plan("{index:03}_{prompt}", 2) == [
            "001_an-astronaut-reading.png",
            "002_an-astronaut-reading.png",
        ]
        assert plan("s{scale}/{seed}.png", scale=0.55) == ["s0.55/40.png"]
        assert plan("{{{seed}}}.png") == ["{40}.png"]

    def test_template_that_collides(self) -> None:
        assert plan("{recipe}.png", 2) == ["hyper-fastface-1.png", "hyper-fastface-2.png"]
        three = [{"recipe": name, "seed": 1} for name in ("a", "a-1", "a")]
        actual = plan_paths("{recipe}.png", count=3, fields=three, force=False)
        assert [str(path) for path in actual] == ["a-2.png", "a-1.png", "a-3.png"]

    def test_names_that_differ_in_case_alone_collide(self) -> None:
        two = [{"prompt": "Cat"}, {"prompt": "cat"}]
        actual = plan_paths("{prompt}.png", count=2, fields=two, force=False)
        assert [str(path) for path in actual] == ["Cat-1.png", "cat-2.png"]

    @pytest.mark.parametrize(
        ("output", "text"),
        [
            ("x.gif", "image format"),
            ("{seed}.tiff", "image format"),
            ("x.tar", "image format"),
            ("{sed}.png", "{sed}"),
            ("{seed.__class__}.png", "{seed.__class__}"),
            ("{seed!r}.png", "formats"),
            ("{seed:>2000000000}.png", "formats"),
            ("{prompt:9}.png", "formats"),
            ("{0}.png", "{0}"),
            ("{}.png", "{}"),
            ("{seed.png", "brace"),
            ("", "empty"),
            ("-", "stdout"),
            ("a\0b.png", "NUL"),
            ("a\nb.png", "control"),
            (".png", "without a name"),
            ("n" * 252 + ".png", "longer"),
            ("\udcff\ud800.png", "not valid text"),
        ],
    )
    def test_refused(self, output: str, text: str) -> None:
        with pytest.raises(UsageError) as caught:
            plan(output)
        assert text in caught.value.message
        assert caught.value.hint

    def test_nearest_field(self) -> None:
        with pytest.raises(UsageError) as caught:
            plan("{sed}.png")
        assert caught.value.hint == "did you mean '{seed}'?"

    def test_existing(self) -> None:
        Path("x.png").write_text("mine")
        with pytest.raises(UsageError, match=r"x\.png already exists") as caught:
            plan("x.png")
        assert "--force" in (caught.value.hint or "")
        assert plan("x.png", force=True) == ["x.png"]
        Path("y-2.png").touch()
        with pytest.raises(UsageError, match=r"y-2\.png already exists"):
            plan("y.png", 3)

    def test_dangling_link_counts_as_existing(self) -> None:
        os.symlink("nowhere", "x.png")
        with pytest.raises(UsageError, match="already exists"):
            plan("x.png")

    def test_not_a_regular_file(self) -> None:
        os.mkfifo("x.png")
        with pytest.raises(UsageError, match="not a regular file"):
            plan("x.png", force=True)
        os.mkdir("y-1.png")
        with pytest.raises(UsageError, match="is a folder"):
            plan("y.png", 2, force=True)

    def test_folder_that_cannot_be(self) -> None:
        Path("file").touch()
        with pytest.raises(UsageError, match="file is not a folder"):
            plan("file/sub/x.png")

    def test_folder_without_permission(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "access", lambda *_: False)
        with pytest.raises(UsageError, match="no permission"):
            plan("sub/x.png")

    def test_thousands(self) -> None:
        assert plan("x.png", 3000)[-1] == "x-3000.png"
        assert plan(None, 3000, seed=1)[-1] == "fastface-hyper-fastface-1-2999.png"

    def test_one_field_mapping_a_image(self) -> None:
        with pytest.raises(ValueError, match="fields for 1"):
            plan_paths("x.png", count=2, fields=fields(1), force=False)

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=4))
    def test_no_value_leaves_the_folder(self, values: list[tuple[str, str]]) -> None:
        many = [{"prompt": prompt, "recipe": recipe, "seed": 1} for prompt, recipe in values]
        for output in ("safe/{prompt}/{recipe}.png", "safe/a-{prompt}{recipe}", "safe/{recipe}.{prompt}.png"):
            actual = plan_paths(output, count=len(many), fields=many, force=False)
            assert len(set(actual)) == len(many)
            for path in actual:
                depth = output.count("/") + 1
                assert path.parts[0] == "safe"
                assert len(path.parts) == depth
                assert ".." not in path.parts
                assert path.suffix == ".png"
                assert str(path).isprintable() or not any(ord(c) < 32 for c in str(path))

    @pytest.mark.parametrize("name", ["con", "NUL", "aux.txt", "lpt1"])
    def test_reserved_values(self, name: str) -> None:
        assert plan("{prompt}.png", prompt=name) == [f"{name}_.png"]


class TestWriting:
    def test_round_trip_and_folder(self) -> None:
        written = write_image(
            small(), Path("new/deep/x.png"), text={"parameters": "hello", "fastface": "ü 漢"}
        )
        assert written == Path("new/deep/x.png")
        with Image.open(written) as image:
            assert image.getpixel((3, 3)) == (200, 10, 30)
            assert image.info["parameters"] == "hello"
            assert not isinstance(image.info["parameters"], PngImagePlugin.iTXt)
            assert image.info["fastface"] == "ü 漢"
            assert isinstance(image.info["fastface"], PngImagePlugin.iTXt)
        assert os.listdir("new/deep") == ["x.png"]

    def test_no_text_is_no_chunk(self) -> None:
        write_image(small(), Path("x.png"))
        data = Path("x.png").read_bytes()
        assert not any(chunk in data for chunk in (b"tEXt", b"iTXt", b"zTXt", b"eXIf", b"tIME"))

    def test_same_image_same_bytes(self) -> None:
        write_image(small(), Path("a.png"), text={"fastface": "1"})
        write_image(small(), Path("b.png"), text={"fastface": "1"})
        assert Path("a.png").read_bytes() == Path("b.png").read_bytes()

    def test_permissions_follow_the_umask(self) -> None:
        old = os.umask(0o027)
        try:
            write_image(small(), Path("x.png"))
        finally:
            os.umask(old)
        assert Path("x.png").stat().st_mode & 0o777 == 0o640

    def test_a_taken_name_is_neither_overwritten_nor_is_the_image_lost(self) -> None:
        Path("x.png").write_text("mine")
        assert write_image(small(), Path("x.png")) == Path("x-1.png")
        assert write_image(small(), Path("x.png")) == Path("x-2.png")
        assert Path("x.png").read_text() == "mine"

    def test_force(self) -> None:
        Path("x.png").write_text("old")
        assert write_image(small(), Path("x.png"), force=True) == Path("x.png")
        assert Image.open("x.png").size == (16, 16)
        assert os.listdir() == ["x.png"]

    def test_race_without_force(self) -> None:
        written: list[Path] = []
        barrier = threading.Barrier(8)

        def write(content: bytes) -> None:
            barrier.wait()
            written.append(files.write_atomically(Path("x.bin"), content, force=False))

        threads = [threading.Thread(target=write, args=(bytes([i]),)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(written)) == 8
        assert {path.read_bytes() for path in written} == {bytes([i]) for i in range(8)}
        assert len(os.listdir()) == 8

    def test_without_hard_links(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
        Path("x.png").write_text("mine")
        assert write_image(small(), Path("x.png")) == Path("x-1.png")
        assert Image.open("x-1.png").size == (16, 16)
        assert sorted(os.listdir()) == ["x-1.png", "x.png"]

    @pytest.mark.parametrize("force", [True, False])
    def test_error_leaves_nothing(self, monkeypatch: pytest.MonkeyPatch, force: bool) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("os.link", full)
        monkeypatch.setattr("os.replace", full)
        with pytest.raises(FastFaceError, match=r"cannot write x\.png: No space left") as caught:
            write_image(small(), Path("x.png"), force=force)
        assert caught.value.exit_code == 1
        assert os.listdir() == []

    def test_interruption_leaves_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Stop(BaseException):
            pass

        def stop(*_: object) -> None:
            raise Stop

        monkeypatch.setattr(os, "link", stop)
        with pytest.raises(Stop):
            write_image(small(), Path("x.png"))
        assert os.listdir() == []

    def test_folder_is_a_file(self) -> None:
        Path("f").touch()
        with pytest.raises(FastFaceError, match="cannot write"):
            write_image(small(), Path("f/x.png"))

    def test_killed_between_write_and_move(self, tmp_path: Path) -> None:
        script = (
            "import os, signal\n"
            "from pathlib import Path\n"
            "from PIL import Image\n"
            "from fastface_cli.output import images\n"
            "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
            "images.write_image(Image.new('RGB', (8, 8)), Path('x.png'), force=True)\n"
        )
        (tmp_path / "x.png").write_text("old")
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False)
        assert done.returncode == -9
        assert (tmp_path / "x.png").read_text() == "old"
        assert all(name.startswith(".fastface-") for name in os.listdir(tmp_path) if name != "x.png")


class TestGrid:
    @pytest.mark.parametrize(
        ("count", "columns"), [(1, 1), (2, 2), (3, 2), (4, 2), (5, 3), (6, 3), (9, 3), (10, 4)]
    )
    def test_sheet_is_nearly_square(self, count: int, columns: int) -> None:
        sheet = grid([Image.new("RGB", (64, 64))] * count)
        assert sheet.size == (columns * 65 + 1, -(-count // columns) * 65 + 1)

    def test_wide_images_are_stacked(self) -> None:
        assert grid([Image.new("RGB", (256, 64))] * 4).width == 256 + 2 * 4

    def test_order(self) -> None:
        colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
        sheet = grid([Image.new("RGB", (64, 64), color) for color in colors])
        assert sheet.size == (2 * 65 + 1, 2 * 65 + 1)
        assert [sheet.getpixel(at) for at in ((20, 20), (90, 20), (20, 90))] == colors
        assert sheet.getpixel((90, 90)) == (255, 255, 255)

    def test_columns_and_mixed_sizes(self) -> None:
        sheet = grid([Image.new("L", (64, 32)), Image.new("RGBA", (32, 64))], columns=5)
        assert sheet.mode == "RGB"
        assert sheet.width == 2 * 65 + 1

    def test_labels_are_drawn_and_stay_in_their_cell(self) -> None:
        images = [Image.new("RGB", (128, 128), "white")] * 2
        plain = grid(images, labels=["", ""])
        written = grid(images, labels=["seed 1", ""])
        long = grid(images, labels=["a very long prompt " * 40, ""])
        assert plain.size == written.size == long.size
        assert len(plain.getcolors() or []) == 1
        assert len(written.getcolors() or []) > 1
        assert len(long.crop((131, 0, *long.size)).getcolors() or []) == 1

    def test_any_label(self) -> None:
        accented, plain = (
            grid([Image.new("RGB", (128, 128))], labels=[text]) for text in ("Mädchen", "Madchen")
        )
        assert accented.tobytes() == plain.tobytes()
        assert grid([small()], labels=["漢字 \n\ud800 🦊"]).width > 16

    def test_large_sheets_shrink(self) -> None:
        sheet = grid([Image.new("RGB", (4096, 2048))] * 6, columns=3, labels=["x"] * 6)
        assert max(sheet.size) <= LONGEST_SIDE

    def test_nonsense(self) -> None:
        for arguments in ({"images": []}, {"images": [small()], "columns": 0}):
            with pytest.raises(ValueError, match="at least one"):
                grid(**arguments)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="2 labels for 1"):
            grid([small()], labels=["a", "b"])


class TestLatents:
    def test_round_trip(self) -> None:
        import torch
        from safetensors.torch import load_file

        latents = torch.randn(4, 2, 4, 8, 8, dtype=torch.float16)
        first = latents[0]
        written = save_latents(
            Path("sub/out.safetensors"),
            initial_latents=first,
            latents=latents,
            timesteps=torch.tensor([999, 749, 499, 249]),
            extra={"branch_predictions": latents[0]},
        )
        actual = load_file(written)
        assert {name: list(tensor.shape) for name, tensor in actual.items()} == {
            "initial_latents": [2, 4, 8, 8],
            "latents": [4, 2, 4, 8, 8],
            "timesteps": [4],
            "branch_predictions": [2, 4, 8, 8],
        }
        assert all(tensor.dtype == torch.float32 for tensor in actual.values())
        assert torch.equal(actual["latents"], latents.float())
        assert actual["timesteps"].tolist() == [999.0, 749.0, 499.0, 249.0]

    def test_shapes_must_agree(self) -> None:
        import torch

        with pytest.raises(ValueError, match="do not match"):
            save_latents(
                Path("x"),
                initial_latents=torch.zeros(2, 4, 8, 8),
                latents=torch.zeros(4, 1, 4, 8, 8),
                timesteps=torch.zeros(4),
            )
        with pytest.raises(ValueError, match="given twice"):
            save_latents(
                Path("x"),
                initial_latents=torch.zeros(1, 4, 8, 8),
                latents=torch.zeros(4, 1, 4, 8, 8),
                timesteps=torch.zeros(4),
                extra={"latents": torch.zeros(1)},
            )
        assert os.listdir() == []
