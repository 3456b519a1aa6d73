"""Fused models that are kept: the command shows and removes them, and the settings bound them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastface_cli.cli import run
from fastface_cli.errors import UsageError
from fastface_cli.settings import load_settings
from fastface_cli.store import Store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("FASTFACE_HOME", str(tmp_path / "home"))
    store = Store(load_settings())
    for letter in "ab":
        store.fused.keep(letter * 64, f"recipe-{letter}", ["adapter x.bin"], 100, _write)
    return store


def _write(file) -> str:
    file.write(bytes(100))
    return "0" * 64


def test_they_are_listed(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["cache", "list"]) == 0
    printed = capfd.readouterr().out
    assert "fused-aaaaaaaaaaaa" in printed
    assert "adapter x.bin" in printed
    assert f"200 B in {store.fused.folder}" in printed
    assert run(["cache", "list", "--json"]) == 0
    actual = json.loads(capfd.readouterr().out)["fused"]
    assert [entry["recipe"] for entry in actual] == ["recipe-a", "recipe-b"]
    assert actual[0]["bytes"] == Path(actual[0]["path"]).stat().st_size == 100


def test_one_is_removed_by_name_and_the_rest_with_everything(
    store: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["cache", "remove", "fused-aaaaaaaaaaaa", "--yes"]) == 0
    assert "removed fused-aaaaaaaaaaaa" in capfd.readouterr().out
    assert [entry.name for entry in store.fused.entries()] == ["fused-bbbbbbbbbbbb"]
    assert run(["cache", "remove", "fused-bbbbbbbbbbbc", "--yes"]) == 2
    assert "did you mean 'fused-bbbbbbbbbbbb'?" in capfd.readouterr().err
    assert run(["cache", "remove", "--all", "--yes", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["freed_bytes"] > 100
    assert list(store.fused.folder.iterdir()) == []


def test_settings_bound_them(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert store.fused.limit == 20_000_000_000
    monkeypatch.setenv("FASTFACE_FUSED_CACHE", "0")
    assert Store(load_settings()).fused.limit == 0
    monkeypatch.setenv("FASTFACE_FUSED_CACHE", "-1")
    with pytest.raises(UsageError, match="fused_cache"):
        load_settings()


@pytest.mark.parametrize(("text", "meant"), [("8", "8"), ("off", "off"), ("'12'", "12"), ("auto", "auto")])
def test_low_memory_is_read_as_people_write_it(
    text: str, meant: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fastface_cli import settings

    file = tmp_path / "config.yaml"
    file.write_text(f"low_memory: {text}\n")
    monkeypatch.setattr(settings, "config_path", lambda: file)
    assert load_settings().low_memory == meant
    monkeypatch.setenv("FASTFACE_LOW_MEMORY", "7")
    with pytest.raises(UsageError, match="low_memory"):
        load_settings()
