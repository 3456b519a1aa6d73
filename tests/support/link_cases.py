"""A cache in which one entry is a symbolic link to files of the user, and what the store does with it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fastface_cli.errors import ModelUnavailableError
from fastface_cli.identity.cache import Remembered
from support.tiny_manifest import BIG, MODEL, Shop, sha256

Act = Callable[[Shop], object]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def replace_with_link(path: Path, target: Path) -> None:
    """Move what is at `path` to `target` and leave a link; create `target` if there is nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path):
        os.replace(path.resolve(), target)
        path.unlink(missing_ok=True)
    elif target.suffix:
        target.write_bytes(b"mine")
    else:
        target.mkdir(parents=True)
    path.symlink_to(target)


def fetch(shop: Shop, *names: str) -> None:
    """Download; a refusal is a result too."""
    with suppress(ModelUnavailableError):
        shop.store().ensure([shop[name] for name in names])


def damage_and_verify(shop: Shop, *names: str) -> None:
    """Verify, and download again."""
    for name in names:
        shop.store().verify(shop[name])
    fetch(shop, *names)


def remove(shop: Shop, *names: str) -> None:
    """Remove the models and everything in quarantine."""
    store = shop.store()
    for name in names:
        store.remove(shop[name])
    store.clear_quarantine()


def empty_identities(shop: Shop) -> None:
    """Remove all identities."""
    Remembered(shop.home).clear()


def empty_fused(shop: Shop) -> None:
    """Use and empty the cache of fused models."""
    fused = shop.store().fused
    for entry in fused.entries():
        fused.remove(entry.key)
    fused.find("a" * 64)
    fused.keep("b" * 64, "r", [], 4, lambda file: str(file.write(b"1234")))
    fused.clear()


LORA, URL, BASE = "hub/models--tiny--lora", "files/tiny-url", "hub/models--tiny--base"
COMMIT = "c0ffee" + "0" * 33 + "1"

CASES: dict[str, tuple[tuple[str, ...], str, Act]] = {
    "a partial file": ((), f"{LORA}/blobs/{sha256(BIG)}.incomplete", lambda shop: fetch(shop, "lora")),
    "the ranges of a partial file": (
        (),
        f"{LORA}/blobs/{sha256(BIG)}.incomplete.ranges",
        lambda shop: fetch(shop, "lora"),
    ),
    "a partial file of a URL": ((), f"{URL}/a+b.pth.part", lambda shop: fetch(shop, "url")),
    "a blob": ((), f"{LORA}/blobs/{sha256(BIG)}", lambda shop: fetch(shop, "lora")),
    "a file of a snapshot": (
        (),
        f"{LORA}/snapshots/{COMMIT}/lora.safetensors",
        lambda shop: damage_and_verify(shop, "lora"),
    ),
    "a file of a URL": ((), f"{URL}/a+b.pth", lambda shop: damage_and_verify(shop, "url")),
    "a lock": ((), f"hub/.locks/models--tiny--lora/{sha256(BIG)}.lock", lambda shop: fetch(shop, "lora")),
    "a blob that is removed": (("lora",), f"{LORA}/blobs/{sha256(BIG)}", lambda shop: remove(shop, "lora")),
    "a snapshot": (("base",), f"{BASE}/snapshots/{COMMIT}", lambda shop: damage_and_verify(shop, "base")),
    "a snapshot that is removed": (
        ("base",),
        f"{BASE}/snapshots/{COMMIT}",
        lambda shop: remove(shop, "base"),
    ),
    "a folder of a snapshot": (
        ("base",),
        f"{BASE}/snapshots/{COMMIT}/vae",
        lambda shop: (remove(shop, "base"), fetch(shop, "base")),
    ),
    "the blobs": ((), f"{LORA}/blobs", lambda shop: fetch(shop, "lora")),
    "the blobs that are removed": (("base",), f"{BASE}/blobs", lambda shop: remove(shop, "base")),
    "a repository": ((), LORA, lambda shop: fetch(shop, "lora")),
    "a repository that is removed": (("base",), BASE, lambda shop: remove(shop, "base")),
    "the folder of a URL": ((), URL, lambda shop: fetch(shop, "url")),
    "the folder of a URL that is removed": (("url",), URL, lambda shop: remove(shop, "url")),
    "all files that are not of the Hub": (("url",), "files", lambda shop: remove(shop, "url")),
    "the quarantine": ((), "quarantine", lambda shop: remove(shop, "lora", "url")),
    "the records": ((), "records", lambda shop: fetch(shop, "lora")),
    "the locks": ((), "hub/.locks", lambda shop: fetch(shop, "lora")),
    "the identities": ((), "identities", empty_identities),
    "the fused models": ((), "fused", empty_fused),
    "a fused model": ((), f"fused/{'a' * 64}.safetensors", empty_fused),
}
"""Case -> models that are downloaded first, what becomes a link, and what is done then."""


def changed(shop: Shop, case: str, outside: Path) -> dict[str, bytes] | None:
    """Run a case; returns the files outside the cache if they changed, else None.

    Args:
        shop: an empty cache and its Hub.
        case: a key of `CASES`.
        outside: an empty folder outside the cache.
    """
    first, entry, act = CASES[case]
    shop.store().ensure([shop[name] for name in first])
    target = outside / (
        "theirs.bin" if "." in Path(entry).name[1:] or len(Path(entry).name) == 64 else "theirs"
    )
    replace_with_link(shop.home / entry, target)
    if target.is_dir():
        (target / "precious.txt").write_bytes(MODEL)
        (target / "vae").mkdir(exist_ok=True)
        (target / "vae/model.safetensors").unlink(missing_ok=True)
        (target / "vae/model.safetensors").write_bytes(b"mine")
        (target / f"{'a' * 64}.json").write_text("{}")
        (target / "old.zip").write_bytes(b"mine")
        (target / "old.safetensors").write_bytes(b"mine")
        (target / f"{sha256(BIG)}.incomplete").write_bytes(b"mine")
    before = contents(outside)
    act(shop)
    after = contents(outside)
    return None if after == before else after
