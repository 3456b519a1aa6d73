"""`fastface generate` with optimizations: the same image, and errors before models are loaded."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastface_cli import cli
from fastface_cli.app.runtime import ResolvedRuntime
from fastface_cli.models.acceleration import DEFAULT
from fastface_cli.models.offload import GIB, LEVELS, OFF
from fastface_cli.output.writer import Behind
from fastface_cli.recipe.files import load_recipe
from fastface_cli.settings import load_settings

EXAMPLE = Path(__file__).parents[2] / "examples" / "portrait.png"


@pytest.fixture(scope="module")
def plain(stack, me, tmp_path_factory):
    """Return the image without optimizations."""
    path = tmp_path_factory.mktemp("plain") / "x.png"
    command = ["generate", *stack, "--identity", me, "--prompt", "a person", "--seed", "4", "-o", path]
    assert cli.run([str(part) for part in command]) == 0
    return path


def most(path: Path, other: Path) -> int:
    """Return the largest difference of two images, in 8-bit levels."""
    import numpy as np

    a, b = (np.asarray(Image.open(file)).astype(int) for file in (path, other))
    return int(abs(a - b).max())


@pytest.mark.parametrize(
    "flags",
    [
        ["--low-memory", "12"],
        ["--low-memory", "8"],
        ["--low-memory", "6"],
        ["--low-memory", "auto"],
        ["--accelerate", "channels_last=on"],
        ["--accelerate", "prune=off", "--accelerate", "cache_kv=off"],
    ],
)
def test_lossless_optimizations_keep_the_image(flags, generate, stack, me, plain, tmp_path):
    path = tmp_path / "x.png"
    ended = generate(*stack, "--identity", me, "--prompt", "a person", "--seed", 4, "-o", path, *flags)
    assert ended.code == 0, ended.err
    assert most(path, plain) <= 1
    assert "lossy" not in json.loads(Image.open(path).text["fastface"])


def test_lossy_optimization_is_recorded_in_the_image(generate, stack, me, tmp_path):
    path = tmp_path / "x.png"
    ended = generate(
        *(*stack, "--identity", me, "--prompt", "a person", "--seed", 4, "-o", path),
        *("--accelerate", "vae=half", "--dtype", "bfloat16"),
    )
    assert ended.code == 0, ended.err
    assert json.loads(Image.open(path).text["fastface"])["lossy"] == {"vae": "half"}
    again = generate(*stack, "--from", path, "--identity", me, "-o", tmp_path / "again.png")
    assert again.code == 0, again.err
    assert "vae=half" in again.err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--low-memory", "10"], 2, "--low-memory '10' is not a level"),
        (["--accelerate", "warp=on"], 2, "--accelerate warp: unknown item"),
        (["--accelerate", "prune=maybe"], 2, "prune is one of on, off"),
        (["--accelerate", "vae=int8"], 2, "vae is one of auto, half, float32"),
        (["--accelerate", "fp8=on"], 4, "cannot multiply 8-bit floats"),
        (["--compile", "--low-memory", "8"], 2, "use --low-memory 12"),
    ],
)
def test_invalid_flags_fail_before_models_are_loaded(flags, code, message, generate, me, tmp_path):
    ended = generate(
        *("--recipe", "pocket", "--identity", me, "--prompt", "x", "-o", tmp_path / "x.png", *flags)
    )
    assert ended.code == code
    assert message in " ".join(ended.err.split())
    assert not list(tmp_path.iterdir())


class TestLevelOfACard:
    """`auto` with a simulated GPU."""

    @pytest.fixture(autouse=True)
    def card(self, monkeypatch, tmp_path, caplog):
        self.caplog = caplog
        monkeypatch.setenv("FASTFACE_HOME", str(tmp_path))
        self.free = 24 * GIB
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (self.free, 24 * GIB))

    def level(self, **options):
        recipe = load_recipe("hyper-fastface").recipe
        return self.resolved(**options).level(recipe), self.caplog.messages

    def resolved(self, acceleration=DEFAULT, offload=None):
        level = offload or load_settings().low_memory
        return ResolvedRuntime(torch.device("cuda:0"), torch.float16, level, acceleration)

    def test_large_gpu_keeps_all_models(self):
        assert self.level() == (OFF, [])

    def test_small_gpu_gets_a_level_and_a_message(self):
        self.free = 8 * GIB
        level, (message,) = self.level()
        assert level is LEVELS["8"]
        assert "8.0 GiB of free memory: using --low-memory 8" in message
        assert "--low-memory off" in message

    def test_compiled_models_are_not_offloaded(self):
        from fastface_cli.models.acceleration import Acceleration

        self.free = 6 * GIB
        level, _ = self.level(acceleration=Acceleration(compile=True))
        assert level is LEVELS["12"]

    def test_flags_and_settings_take_precedence(self, monkeypatch):
        self.free = 8 * GIB
        assert self.level(offload="off") == (OFF, [])
        monkeypatch.setenv("FASTFACE_LOW_MEMORY", "6")
        assert self.level() == (LEVELS["6"], [])

    def test_pocket_is_not_offloaded(self):
        self.free = GIB
        assert self.resolved().level(load_recipe("pocket").recipe) is OFF


class TestRemembered:
    @pytest.fixture(autouse=True)
    def home(self, monkeypatch, tmp_path):
        monkeypatch.setenv("FASTFACE_HOME", str(tmp_path / "home"))
        self.folder = tmp_path / "home" / "identities"

    def make(self, generate, tmp_path, *flags):
        command = ("--recipe", "pocket", "--face", EXAMPLE, "--prompt", "a woman", "--seed", 1, "--force")
        ended = generate(*command, "-o", tmp_path / "x.png", *flags)
        assert ended.code == 0, ended.err
        return Image.open(tmp_path / "x.png").tobytes()

    def test_identities_are_not_cached_by_default(self, generate, tmp_path):
        self.make(generate, tmp_path)
        assert not self.folder.exists()

    def test_cached_identity_is_not_computed_again(self, generate, tmp_path, monkeypatch):
        first = self.make(generate, tmp_path, "--remember")
        (kept,) = self.folder.iterdir()
        assert kept.suffix == ".safetensors"

        def measured(*_, **__):
            raise AssertionError("the identity is computed again")

        monkeypatch.setattr("fastface_cli.identity.identity.make_identity", measured)
        assert self.make(generate, tmp_path, "--remember") == first

    def test_other_face_index_is_another_cached_identity(self, generate, tmp_path):
        self.make(generate, tmp_path, "--remember")
        self.make(generate, tmp_path, "--remember", "--face-index", "0")
        assert len(list(self.folder.iterdir())) == 2

    def test_broken_cached_identity_is_computed_again(self, generate, tmp_path):
        first = self.make(generate, tmp_path, "--remember")
        (kept,) = self.folder.iterdir()
        kept.write_bytes(b"broken")
        assert self.make(generate, tmp_path, "--remember") == first
        assert len(kept.read_bytes()) > 100

    def test_cache_command_lists_and_removes_identities(self, generate, tmp_path, capfd):
        self.make(generate, tmp_path, "--remember")
        assert cli.run(["cache", "list"]) == 0
        assert "1 cached identities" in capfd.readouterr().out
        assert cli.run(["cache", "remove", "identities", "--yes"]) == 0
        assert list(self.folder.iterdir()) == []
        assert "removed identities" in capfd.readouterr().out


class TestBehind:
    def test_jobs_run_in_order_in_the_background(self):
        done: list[int] = []
        with Behind() as behind:
            for number in range(8):
                behind.do(lambda number=number: (time.sleep(0.01), done.append(number)))
            assert len(done) < 8
        assert done == list(range(8))

    def test_error_of_a_job_reaches_the_caller(self):
        def fails() -> None:
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"), Behind() as behind:
            behind.do(fails)

    def test_finished_images_are_written_after_an_error_of_the_caller(self):
        done: list[int] = []

        def interrupted() -> None:
            with Behind() as behind:
                behind.do(lambda: (time.sleep(0.05), done.append(1)))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert done == [1]
