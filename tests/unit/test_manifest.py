"""The manifest that ships, and how references and listings are understood."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastface_cli.errors import RecipeError
from fastface_cli.recipe.files import load_recipe, recipe_names
from fastface_cli.recipe.schema import HubReference
from fastface_cli.settings import Settings
from fastface_cli.store import Store, human_bytes, license_line
from fastface_cli.store.manifest import PACKAGE, load_manifest, parse_manifest, resolve, whole_selection


@pytest.mark.parametrize("artifact", load_manifest().values(), ids=list(load_manifest()))
def test_every_artifact_is_pinned_and_licensed(artifact) -> None:
    assert artifact.commercial in ("yes", "no", "unclear")
    assert artifact.license
    assert artifact.license_link.startswith("https://")
    assert artifact.summary
    if artifact.commercial != "yes":
        assert artifact.commercial_note
    paths = [file.path for file in artifact.files]
    assert len(set(paths)) == len(paths)
    if artifact.local is not None:
        assert artifact.packaged
        assert artifact.local.is_relative_to(PACKAGE / "pocket" / "weights")
        return
    if artifact.repo is not None:
        assert re.fullmatch(r"[0-9a-f]{40}", str(artifact.commit))
    else:
        assert len(artifact.files) == 1
        assert artifact.files[0].sha256, "what is not on the Hub has no other hash"
    for file in artifact.files:
        assert file.sha256 is None or re.fullmatch(r"[0-9a-f]{64}", file.sha256)
        assert file.expected_bytes > 0
        if file.expected_bytes > 10_000_000:
            assert file.sha256, "a large file is pinned"
        if artifact.root:
            assert file.path.startswith(artifact.root + "/")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_that_ships_names_artifacts_of_the_manifest(name: str) -> None:
    recipe = load_recipe(name).recipe
    for reference in recipe.references().values():
        assert reference in load_manifest()


def total(*names: str) -> int:
    return sum(load_manifest()[name].bytes for name in names)


def test_sizes_add_up_to_what_is_published() -> None:
    """The whole base as its publisher lists it, and the stack of the default recipe."""
    doubles = 1680 + 642
    base = total("sdxl-base", "sdxl-base-unet", "sdxl-base-vae") - doubles
    assert base == 6_941_187_536
    recipe = load_recipe("hyper-fastface").recipe
    stack = sum(resolve(reference).bytes for reference in recipe.references().values())
    assert 12.0e9 < stack < 12.2e9
    assert stack - total("sdxl-vae-fp16-fix") + total("sdxl-base-vae") == pytest.approx(11.94e9, abs=1e7)


def test_where_loaders_look(tmp_path: Path) -> None:
    store = Store(Settings(home=tmp_path), offline=True)
    names = load_manifest()

    def inside(name: str) -> str:
        path = store.path(names[name])
        return path.relative_to(store.layout.folder(names[name])).as_posix()

    assert inside("sdxl-base") == "."
    assert inside("sdxl-base-unet") == "."
    assert inside("sdxl-turbo-scheduler") == "."
    assert inside("sdxl-base-vae") == "vae"
    assert inside("sdxl-vae-fp16-fix") == "."
    assert inside("ip-adapter-image-encoder") == "models/image_encoder"
    assert inside("buffalo_l") == "models/buffalo_l"
    assert inside("hyper-sdxl-4-step-lora") == "Hyper-SDXL-4steps-lora.safetensors"
    assert inside("sdxl-lightning-4-step-unet") == "sdxl_lightning_4step_unet.safetensors"
    assert store.path(names["pocket-clip"]) == PACKAGE / "pocket/weights/clip"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("commit: " + "a" * 40, "commit: main"), "40 hex digits"),
        (("[x.bin, 5, " + "b" * 64, "[x.bin, 5, abc"), "not a SHA-256"),
        (("repo: a/b, ", ""), "exactly one of"),
        (("files: [[x.bin, 5, " + "b" * 64 + "]]", "files: []"), "has no files"),
    ],
)
def test_a_manifest_that_is_not_well_formed(change: tuple[str, str], complaint: str) -> None:
    entry = (
        "{name: one, kind: lora, summary: s, repo: a/b, commit: " + "a" * 40 + ", license: l, "
        "files: [[x.bin, 5, " + "b" * 64 + "]]}"
    )
    text = "licenses: {l: [MIT, 'https://x', yes, '']}\nartifacts:\n  - "
    assert list(parse_manifest(text + entry)) == ["one"]
    with pytest.raises(ValueError, match="twice"):
        parse_manifest(f"{text}{entry}\n  - {entry}")
    assert change[0] in entry
    with pytest.raises(ValueError, match=complaint):
        parse_manifest(text + entry.replace(*change))


def test_what_counts_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for reference in ("./a", "../a", "/a", "~/a", "a.safetensors", "b/a.BIN", "a.onnx", r"C:\a", "models"):
        artifact = resolve(reference)
        assert artifact.local == Path(reference).expanduser()
        assert not artifact.packaged


def test_complete_repository_takes_one_set_of_weights() -> None:
    sdxl = [
        "model_index.json",
        "sd_xl_base_1.0.safetensors",
        "LICENSE.md",
        "scheduler/scheduler_config.json",
        "text_encoder/flax_model.msgpack",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder/model.onnx",
        "text_encoder/openvino_model.bin",
        "tokenizer/merges.txt",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.bin",
        "vae_1_0/diffusion_pytorch_model.safetensors",
        "vae_decoder/model.onnx",
    ]
    assert whole_selection(sdxl) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/model.fp16.safetensors",
        "tokenizer/merges.txt",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.bin",
    ]
    assert whole_selection(sdxl, "vae") == ["vae/config.json", "vae/diffusion_pytorch_model.bin"]
    assert whole_selection(["a.onnx", "b.onnx"]) == ["a.onnx", "b.onnx"]
    assert whole_selection(["readme.md"], "elsewhere") == []


def test_words_for_people() -> None:
    assert [human_bytes(count) for count in (0, 999, 1000, 999_600, 1_487_555_181)] == [
        "0 B",
        "999 B",
        "1 kB",
        "1 MB",
        "1.49 GB",
    ]
    assert "no commercial use" in license_line(load_manifest()["buffalo_l"])
    assert "commercial use unclear" in license_line(load_manifest()["hyper-sdxl-4-step-lora"])


@pytest.mark.parametrize(
    "repo", ["../x", "a/..", ".a/b", "-a/b", "a/b-", "a/b.", "a--b/c", "a/b..c", "a/b.git", "\u00e9/b"]
)
def test_names_that_no_repository_can_have(repo: str) -> None:
    with pytest.raises(RecipeError, match="is not a pinned Hub reference") as caught:
        resolve(f"hub:{repo}@{'a' * 40}:x.safetensors")
    assert "write hub:owner/name@" in str(caught.value.hint)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        with pytest.raises(RecipeError, match="is not a repository of the Hugging Face Hub"):
            resolve(HubReference(repo=repo, commit="a" * 40))


def test_names_that_a_repository_can_have() -> None:
    for repo in ("a/b", "h94/IP-Adapter-FaceID", "_a/b_c", "stabilityai/stable-diffusion-xl-base-1.0"):
        assert resolve(f"hub:{repo}@{'a' * 40}:x.safetensors").repo == repo
    for artifact in load_manifest().values():
        if artifact.repo:
            assert resolve(f"hub:{artifact.repo}@{artifact.commit}").repo == artifact.repo
