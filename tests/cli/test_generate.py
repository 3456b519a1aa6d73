"""`fastface generate` as a user meets it, on a random miniature of the stack."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastface_cli import cli
from fastface_cli.errors import FastFaceError, UsageError

MAIN = "from fastface_cli.cli import main; main()"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------- pictures and records


@pytest.fixture(scope="module")
def outputs(stack, me, tmp_path_factory):
    """Two seeds and two adapter scales in one call, with everything that can be asked for."""
    folder = tmp_path_factory.mktemp("made")
    stdout = folder / "stdout.json"
    with stdout.open("w") as out, (folder / "err.txt").open("w") as err:
        # A real process: what libraries print while they are imported counts too.
        code = subprocess.run(
            [
                *(sys.executable, "-c", MAIN, "generate", *stack, "--identity", me, "--size", "64x96"),
                *("--prompt", "a café", "--seed", "5", "--count", "2", "--adapter-scale", "0.2,0.8"),
                *("-o", folder / "x.png", "--grid", "--save-latents", folder / "latents.safetensors"),
                *("--save-identity", folder / "copy.safetensors", "--json", "-v"),
            ],
            stdout=out,
            stderr=err,
            check=False,
        ).returncode
    assert code == 0, (folder / "err.txt").read_text()
    return folder


def test_json_lists_every_image(outputs):
    record = json.loads((outputs / "stdout.json").read_text())
    assert (record["schema"], record["ok"], record["error"]) == (1, True, None)
    keys = ("path", "prompt", "seed", "adapter_scale", "unet_samples")
    assert [tuple(image[key] for key in keys) for image in record["images"]] == [
        (str(outputs / "x-1.png"), "a café", 5, 0.2, 10),
        (str(outputs / "x-2.png"), "a café", 5, 0.8, 10),
        (str(outputs / "x-3.png"), "a café", 6, 0.2, 10),
        (str(outputs / "x-4.png"), "a café", 6, 0.8, 10),
    ]
    assert all(image["seconds"] > 0 for image in record["images"])
    assert record["grid"] == str(outputs / "x-1-grid.png")


def test_only_what_was_asked_for_is_written(outputs):
    pictures = ["x-1-grid.png", "x-1.png", "x-2.png", "x-3.png", "x-4.png"]
    assert names(outputs) == sorted(
        [*pictures, "copy.safetensors", "err.txt", "latents.safetensors", "stdout.json"]
    )
    sizes = {Image.open(outputs / name).size for name in pictures if "grid" not in name}
    assert sizes == {(64, 96)}
    assert len({Image.open(outputs / name).tobytes() for name in pictures}) == 5


def test_verbose_prints_the_plan_and_nothing_else_chatters(outputs):
    lines = (outputs / "err.txt").read_text().splitlines()
    assert lines[0].startswith("recipe hyper-fastface, digest ")
    assert lines[1].startswith("models loaded in ")
    assert lines[2:] == [
        "step 1: t = 999, identity 1, text 1, computes e1, e2",
        "step 2: t = 749, identity 1.5, text 3, computes e0, e1, e2",
        "step 3: t = 499, identity 1.5, text 3, computes e0, e1, e2",
        "step 4: t = 249, identity 1, text 1, computes e1, e2",
        "10 UNet samples per image",
    ]


def test_latents_contain_every_step_of_every_image(outputs):
    actual = load_file(outputs / "latents.safetensors")
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in actual.items()} == {
        "initial_latents": ((4, 4, 12, 8), torch.float32),
        "latents": ((4, 4, 4, 12, 8), torch.float32),
        "timesteps": ((4,), torch.float32),
    }
    initial = actual["initial_latents"]
    assert initial[0].equal(initial[1])  # the same seed
    assert not initial[0].equal(initial[2])


def test_a_kept_identity_is_the_same_person(outputs, me):
    from fastface_cli.identity.identity import Identity

    assert Identity.load(outputs / "copy.safetensors").digest() == Identity.load(me).digest()


def test_batch_gives_the_images_of_single_calls(outputs, generate, stack, me, tmp_path):
    latents = tmp_path / "latents.safetensors"
    ended = generate(
        *stack, "--identity", me, "--size", "64x96", "--prompt", "a café", "--seed", 5, "--count", 2,
        "--adapter-scale", "0.2,0.8", "--batch-size", 3, "-o", tmp_path / "y.png", "--save-latents", latents,
    )  # fmt: skip
    assert ended.code == 0
    assert ended.out.splitlines() == [str(tmp_path / f"y-{number}.png") for number in (1, 2, 3, 4)]
    assert ended.err == ""
    actual, expected = load_file(latents)["latents"], load_file(outputs / "latents.safetensors")["latents"]
    assert (actual - expected).norm() / expected.norm() < 1e-4


def test_python_gives_the_image_of_the_command(outputs, layout, me):
    from fastface_cli import FastFace
    from fastface_cli.identity.identity import Identity

    size = ["sampling.width=64", "sampling.height=96"]
    face = FastFace("hyper-fastface", overrides=size, stack=layout, device="cpu")
    pictures = face.generate(Identity.load(me), "a café", seed=5, count=2)
    for picture, name in zip(pictures, ("x-2.png", "x-4.png"), strict=True):
        assert picture.tobytes() == Image.open(outputs / name).tobytes()


# -------------------------------------------------------------------------------------------------- replay


def test_replay_makes_the_same_file(outputs, generate, layout, me, tmp_path):
    again = tmp_path / "again.png"
    ended = generate("--from", outputs / "x-3.png", "--stack", layout, "--identity", me, "--device", "cpu",
                     "-o", again, "--seed", 6)  # fmt: skip
    assert ended == (0, f"{again}\n", "")
    assert again.read_bytes() == (outputs / "x-3.png").read_bytes()


def test_replay_takes_overrides_and_notices_another_person(outputs, generate, layout, somebody, tmp_path):
    ended = generate(
        "--from", outputs / "x-3.png", "--stack", layout, "--identity", somebody, "--device", "cpu", "--json",
        "-o", tmp_path / "again.png", "--steps", 2, "--set", "adapter.scale=0.7", "--set", "prompt=other",
    )  # fmt: skip
    assert ended.code == 0
    assert ended.err == "warning: this is not the identity that the image was made with\n"
    image = ended.json["images"][0]
    assert (image["prompt"], image["seed"], image["adapter_scale"], image["unet_samples"]) == (
        "other",
        6,
        0.7,
        4,
    )


def test_replay_asks_for_local_files(outputs, generate, me):
    ended = generate("--from", outputs / "x-1.png", "--identity", me, "--json")
    assert ended.code == 2
    assert "--set model.base=PATH" in ended.json["error"]["hint"]


def test_without_metadata_there_is_nothing_to_replay(generate, stack, me, tmp_path):
    path = tmp_path / "mute.png"
    flags = ["--identity", me, "--device", "cpu"]
    long = "many words " * 60
    ended = generate(*stack, *flags, "--prompt", long, "-o", path, "--no-metadata", "--steps", 1)
    assert (ended.code, ended.out) == (0, f"{path}\n")
    assert "seed " in ended.err
    assert "this part of the prompt is ignored" in ended.err
    with Image.open(path) as picture:
        assert picture.info == {}
    ended = generate("--from", path, *flags, "--json")
    assert ended.code == 2
    assert "does not say how it was made" in ended.json["error"]["message"]


# ---------------------------------------------------------------------------------- what is asked for wrongly


WRONG = {
    "no prompt": ([], "there is no prompt"),
    "seed too low": (["--prompt", "a", "--seed", "-1"], "seed -1 is out of range"),
    "seeds run over": (["-p", "a", "--seed", str(2**63 - 1), "--count", "2"], "out of range"),
    "size in words": (["-p", "a", "--size", "64x"], "--size '64x' is not a size"),
    "size of no multiple": (["-p", "a", "--size", "65"], "must be a multiple of 8"),
    "scale in words": (["-p", "a", "--adapter-scale", "much"], "--adapter-scale 'much'"),
    "scale not a number": (["-p", "a", "--adapter-scale", "0.5,nan"], "between -5 and 5"),
    "LoRA scale too high": (["-p", "a", "--lora-scale", "9"], "adapter.lora_scale"),
    "dtype": (["-p", "a", "--dtype", "int8"], "dtype 'int8'"),
    "device": (["-p", "a", "--device", "tpu"], "'tpu' is not a device"),
    "recipe": (["-p", "a", "--recipe", "hypr"], "there is no recipe 'hypr'"),
    "field": (["-p", "a", "--set", "guidance.txt=1"], "guidance.txt: unknown key"),
    "suffix": (["-p", "a", "-o", "x.gif"], "is not an image format"),
    "template": (["-p", "a", "-o", "{sed}.png"], "'{sed}' in the output template"),
    "existing": (["-p", "a", "-o", "there.png"], "there.png already exists"),
    "inside a file": (["-p", "a", "-o", "there.png/x.png"], "there.png is not a folder"),
    "one file twice": (["-p", "a", "--save-latents", "q", "--save-identity", "q"], "both go to q"),
    "grid over a picture": (
        ["-p", "a", "-p", "a-grid", "-o", "{prompt}.png", "--grid"],
        "--grid and another",
    ),
    "prompts": (["--prompts-file", "missing.txt"], "cannot read the prompts file missing.txt"),
    "two recipes": (["-p", "a", "--from", "there.png", "--recipe", "lcm"], "both name a recipe"),
    "replay of a photo": (["--from", "there.png"], "there.png does not say how it was made"),
    "two people": (["-p", "a", "--face", "there.png"], "both name a person"),
    "four numbers": (["-p", "a", "--face-box", "1,2,3"], "is not four numbers"),
    "unknown flag": (["-p", "a", "--sed", "1"], "No such option: --sed. Did you mean --seed?"),
    "photo without a flag": (
        ["me.jpg"],
        "Got unexpected extra argument(s) (me.jpg). Write --face before a photo, --prompt before text",
    ),
    "count": (["-p", "a", "--count", "0"], "--count"),
    "no value": (["-p"], "requires an argument"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_end_with_2_and_one_object(case, generate, layout, me, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("there.png")
    before = Path("there.png").read_bytes()
    arguments, message = WRONG[case]
    ended = generate("--json", "--stack", layout, "--identity", me, "--device", "cpu", *arguments)
    assert ended.code == 2
    assert list(ended.json) == ["schema", "ok", "images", "error"]
    assert (ended.json["ok"], ended.json["images"]) == (False, [])
    assert message in ended.json["error"]["message"]
    assert message in " ".join(ended.err.split())
    assert "Traceback" not in ended.err
    assert names(tmp_path) == ["there.png"]
    assert Path("there.png").read_bytes() == before


@pytest.mark.parametrize(
    ("face", "message"),
    [
        ([], "there is no person"),
        (["--face", "missing.jpg"], "there is no photo missing.jpg"),
        (["--identity", "missing.safetensors"], "there is no identity file"),
        (["--face", __file__], "is not a readable image"),
        (["--face", "photo.png", "--face-box", "nan,0,1,1"], "is not a face box"),
    ],
)
def test_missing_person_is_reported(face, message, generate, stack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("photo.png")
    ended = generate(*stack, "--prompt", "a", *face)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: ")
    assert message in ended.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_full_size_stack_asks_for_a_gpu_before_any_download(generate, me, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFACE_HOME", str(tmp_path / "home"))
    ended = generate("--identity", me, "--prompt", "a", "--json")
    assert ended.code == 4
    assert ended.json["error"]["kind"] == "device"
    assert "--recipe pocket" in ended.json["error"]["hint"]
    assert generate("--identity", me, "--prompt", "a", "--device", "cuda:7").code == 4
    assert names(tmp_path) == []


def test_missing_models_without_a_network(generate, me, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFACE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    ended = generate("--identity", me, "--prompt", "a", "--device", "cpu", "--offline", "--json")
    assert ended.code == 3
    assert "sdxl-base-unet (5.14 GB)" in ended.json["error"]["message"]
    assert "buffalo_l" not in ended.json["error"]["message"]  # an identity needs no face models


def test_settings_that_are_nonsense(generate, stack, me, tmp_path, monkeypatch):
    from fastface_cli import settings

    path = tmp_path / "config.yaml"
    monkeypatch.setattr(settings, "config_path", lambda: path)
    for text, message in (
        ("devise: cpu", "there is no setting 'devise'"),
        ("device: [1", "cannot read the settings file"),
        ("only text", "'name: value' lines"),
        ("verbosity: loud", "setting 'verbosity'"),
    ):
        path.write_text(text)
        ended = generate(*stack, "--identity", me, "--prompt", "a")
        assert (ended.code, ended.out) == (2, "")
        assert message in ended.err
        assert "Traceback" not in ended.err


# -------------------------------------------------------------------------------------------- broken models


UNET = "pipe/unet/diffusion_pytorch_model.safetensors"
TEXT = "pipe/text_encoder/model.safetensors"
ADAPTER = "faceid_plusv2.bin"


class Payload:
    """Unpickled without care, it would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])


def swap(path: Path) -> None:
    """One tensor in another shape."""
    state = load_file(path)
    state[min(state)] = torch.zeros(3, 3)
    path.unlink()
    save_file(state, path, metadata={"format": "pt"})


def lose(path: Path) -> None:
    """One tensor less."""
    state = load_file(path)
    del state[min(state)]
    path.unlink()
    save_file(state, path, metadata={"format": "pt"})


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def become_empty(path: Path) -> None:
    path.unlink()
    path.write_text("{}")


def become_code(path: Path) -> None:
    path.unlink()
    path.write_bytes(pickle.dumps({"image_proj": Payload(), "ip_adapter": Payload()}, protocol=2))


def forget(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    del state["ip_adapter"]["1.to_k_ip.weight"]
    path.unlink()
    torch.save(state, path)


BROKEN = {
    "cut UNet": (UNET, cut, "cannot load the UNet"),
    "UNet of another shape": (UNET, swap, "add_embedding.linear_1.bias expected shape"),
    "a folder for the UNet": (UNET, become_folder, "no file named diffusion_pytorch_model.safetensors"),
    "cut text encoder": (TEXT, cut, "cannot load the text encoders"),
    "text encoder of another shape": (TEXT, swap, "0 tensors are missing, 1 have another shape"),
    "tensor missing": (TEXT, lose, "1 tensors are missing, 0 have another shape"),
    "no tokenizer": ("pipe/tokenizer/tokenizer_config.json", Path.unlink, "the tokenizer does not truncate"),
    "no encoder": ("clip/model.safetensors", Path.unlink, "cannot load the image encoder"),
    "empty scheduler": ("pipe/scheduler/scheduler_config.json", become_empty, "beta_schedule"),
    "cut adapter": (ADAPTER, cut, "cannot load the identity adapter"),
    "adapter without a key": (ADAPTER, forget, "it lacks '1.to_k_ip.weight'"),
    "adapter that is code": (ADAPTER, become_code, "cannot load the identity adapter"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_file_ends_with_3(case, generate, layout, me, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, damage, message = BROKEN[case]
    shutil.copytree(layout, "broken")
    damage(Path("broken") / name)
    ended = generate("--stack", "broken", "--identity", me, "--prompt", "a", "-o", "x.png", "--device", "cpu",
                     "--seed", 1, "--json")  # fmt: skip
    assert ended.code == 3
    assert ended.json["error"]["kind"] == "models"
    assert message in ended.json["error"]["message"]
    # The libraries' own complaints would come on top.
    assert ended.err.splitlines()[0] == f"error: {ended.json['error']['message']}"
    assert len(ended.err.splitlines()) == 3
    assert names(tmp_path) == ["broken"]


def test_weights_that_are_no_numbers(generate, layout, me, tmp_path):
    shutil.copytree(layout, tmp_path / "broken")
    unet = tmp_path / "broken" / UNET
    save_file({name: tensor * torch.nan for name, tensor in load_file(unet).items()}, unet)
    ended = generate("--stack", tmp_path / "broken", "--identity", me, "--prompt", "a", "--device", "cpu",
                     "--size", 64, "--steps", 1, "-o", tmp_path / "x.png", "--json")  # fmt: skip
    assert ended.code == 1
    assert "not finite" in ended.json["error"]["message"]
    assert names(tmp_path) == ["broken"]


# ------------------------------------------------------------------------------------------- how it can end


@pytest.mark.parametrize(
    ("raised", "code", "kind", "message"),
    [
        (RuntimeError("the ground shakes\nand more"), 1, "run_failed", "the ground shakes"),
        (ValueError(), 1, "run_failed", "unexpected ValueError"),
        (FastFaceError("no luck", "try again"), 1, "run_failed", "no luck"),
        (UsageError("not so"), 2, "usage", "not so"),
        (cli.Interrupted(), 130, "interrupted", "interrupted"),
    ],
)
def test_json_lists_the_finished_images_whatever_ends_the_run(
    raised, code, kind, message, generate, monkeypatch, tmp_path
):
    from PIL import Image

    from fastface_cli.app.events import ImageFinished
    from fastface_cli.app.generation import Generation
    from fastface_cli.output.metadata import Provenance
    from fastface_cli.recipe.files import load_recipe

    provenance = Provenance(
        recipe=load_recipe("pocket").recipe,
        prompt="a",
        negative_prompt=None,
        seed=1,
        adapter_scale=0.8,
        identity_digest="0" * 16,
        unet_samples=10,
        versions={},
    )
    image = ImageFinished(Path("x.png"), Image.new("RGB", (8, 8)), provenance, seconds=1.0)

    def run(generation):
        generation.emit(image)
        raise raised

    monkeypatch.setattr(Generation, "run", run)
    ended = generate(
        "--recipe",
        "pocket",
        "--face",
        Path(__file__).parents[2] / "examples/portrait.png",
        "--prompt",
        "a",
        "-o",
        tmp_path / "y.png",
        "--json",
    )
    assert ended.code == code
    assert ended.json["images"] == [image.record()]
    assert ended.json["error"]["kind"] == kind
    assert ended.json["error"]["code"] == code
    assert message in ended.json["error"]["message"]
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_debug_shows_the_traceback(generate, monkeypatch):
    monkeypatch.setenv("FASTFACE_DEBUG", "1")
    with pytest.raises(UsageError, match="there is no prompt"):
        generate("--recipe", "pocket")


def test_json_survives_names_that_are_no_text(generate, stack):
    ended = generate(
        *stack, "--prompt", "a", "--face", b"\xff.png".decode("utf-8", "surrogateescape"), "--json"
    )
    assert ended.code == 2
    assert ended.json["error"]["message"] == "there is no photo \udcff.png"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_on_a_terminal_leaves_a_piped_stdout_alone():
    import pty

    leader, follower = pty.openpty()
    code = (
        "from fastface_cli import console\n"
        "with console.step_progress() as progress:\n"
        "    progress.add_task('steps', total=2)\n"
        "    console.line('a.png')\n"
    )
    environment = {**os.environ, "TERM": "xterm"}
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=follower, env=environment, check=True
    )
    os.close(follower)
    assert done.stdout == b"a.png\n"
    assert b"steps" in os.read(leader, 65536)
    os.close(leader)


@pytest.mark.slow
@pytest.mark.parametrize("after", ["import", "first picture"])
def test_ctrl_c(after, stack, me, tmp_path):
    arguments = [*stack, "--identity", str(me), "--prompt", "a", "--seed", "1", "--count", "300", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "generate", *arguments, "-o", str(tmp_path / "{seed}.png")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(1.5)
    deadline = time.monotonic() + 120
    while after == "first picture" and not (tmp_path / "1.png").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")
    record = json.loads(out)
    assert record["error"]["kind"] == "interrupted"
    # A picture may be on disk and not yet in the list; never the other way round, and never half of one.
    assert {Path(image["path"]).name for image in record["images"]} <= set(names(tmp_path))
    for name in names(tmp_path):
        with Image.open(tmp_path / name) as picture:
            picture.load()


@pytest.mark.slow
def test_a_reader_that_goes_away(stack, me, tmp_path):
    arguments = [*stack, "--identity", str(me), "--prompt", "a", "--seed", "1", "--steps", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "generate", *arguments, "-o", str(tmp_path / "x.png")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 1


# ------------------------------------------------------------------------------------------ models and dtypes


STEPS = [
    (model, steps)
    for model in ("hyper", "lightning", "lcm", "turbo", "base")
    for steps in (1, 2, 8)
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("model", "steps"), STEPS)
def test_every_model_runs_at_every_step_count(model, steps, generate, stack, me, tmp_path):
    ended = generate(*stack, "--recipe", model, "--steps", steps, "--size", "72x104", "--identity", me,
                     "--prompt", "a", "--seed", 1, "-o", tmp_path / "x.png", "--json")  # fmt: skip
    assert ended.code == 0
    assert ended.err == ""
    expected = 2 * steps if model == "base" else {1: 2, 2: 4, 8: 22}[steps]
    assert ended.json["images"][0]["unet_samples"] == expected
    assert Image.open(tmp_path / "x.png").size == (72, 104)


def test_steps_without_a_checkpoint_name_the_choices(generate, me):
    ended = generate("--recipe", "hyper", "--steps", 3, "--identity", me, "--prompt", "a", "--json")
    assert ended.code == 2
    assert "choose one of 1, 2, 4, 8" in ended.json["error"]["message"]


def test_a_prompt_in_a_name_cannot_leave_its_folder_or_hide(generate, stack, me, tmp_path):
    ended = generate(*stack, "--steps", 1, "--identity", me, "--prompt", "../../etc/x", "--seed", 1,
                     "-o", f"{tmp_path}/{{prompt}}-{{seed:03}}.png")  # fmt: skip
    assert ended == (0, f"{tmp_path / 'etc-x-001.png'}\n", "")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_on_a_cpu(dtype, generate, stack, me, tmp_path):
    ended = generate(*stack, "--dtype", dtype, "--steps", 1, "--identity", me, "--prompt", "a", "--seed", 1,
                     "-o", tmp_path / "x.png")  # fmt: skip
    assert ended == (0, f"{tmp_path / 'x.png'}\n", "")


# ---------------------------------------------------------------------------------------------- pocket stack


@pytest.fixture
def pocket() -> None:
    import fastface_cli

    if not (Path(fastface_cli.__file__).parent / "pocket" / "weights").is_dir():
        pytest.skip("the pocket weights are not here")


@pytest.mark.usefixtures("pocket")
def test_pocket_from_a_photo(generate, tmp_path, monkeypatch):
    """A photo of six people, whatever its faces are worth to the pocket models."""
    import insightface.data

    monkeypatch.setenv("FASTFACE_HOME", str(tmp_path / "home"))
    photo = tmp_path / "people.png"
    Image.fromarray(insightface.data.get_image("t1")[..., ::-1]).save(photo)
    flags = ["--prompt", "a woman smiling", "--seed", 3, "--json"]
    kept = tmp_path / "me.safetensors"
    ended = generate(
        "--recipe", "pocket", "--face", photo, *flags, "-o", tmp_path / "x.png", "--save-identity", kept
    )
    if ended.code == 5:
        assert ended.json["error"]["kind"] == "no_face"
        assert not kept.exists()
        return
    assert ended.code == 0
    assert Image.open(tmp_path / "x.png").size == (128, 128)
    again = generate("--recipe", "pocket", "--identity", kept, *flags, "-o", tmp_path / "y.png")
    assert (again.code, again.err) == (0, "")
    assert (tmp_path / "y.png").read_bytes() == (tmp_path / "x.png").read_bytes()
    assert not (tmp_path / "home").exists()
