"""Pinned packages: constraints.txt and requirements.lock agree, and every locked file has a hash."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    pins = (line.split("==") for line in lines)
    return {canonicalize_name(name): version for name, version in pins}


def locked() -> dict[str, tuple[Requirement, list[str]]]:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", "")
    packages = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        requirement, *hashes = re.split(r"\s+--hash=", line.strip())
        parsed = Requirement(requirement)
        packages[canonicalize_name(parsed.name)] = (parsed, hashes)
    return packages


def test_every_constraint_is_locked_at_the_same_version() -> None:
    versions = {name: str(requirement.specifier) for name, (requirement, _) in locked().items()}
    assert {name: f"=={version}" for name, version in constraints().items()} == {
        name: versions.get(name) for name in constraints()
    }


def test_packages_of_every_platform_are_constrained() -> None:
    """What only one platform needs (CUDA libraries, colorama) is in the lock alone."""
    unconditional = {name for name, (requirement, _) in locked().items() if requirement.marker is None}
    assert unconditional <= set(constraints())


def test_every_locked_package_has_hashes() -> None:
    assert len(locked()) > 100
    for name, (_, hashes) in locked().items():
        assert hashes, name
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value) for value in hashes), name


def test_every_direct_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    optional = project["project"]["optional-dependencies"]
    direct = [*project["project"]["dependencies"], *project["build-system"]["requires"], "pip", "setuptools"]
    direct += [name for extra in ("dev", "dlib", "ray", "diversefaces") for name in optional[extra]]
    for text in direct:
        requirement = Requirement(text)
        version = constraints().get(canonicalize_name(requirement.name))
        assert version is not None, f"{text} is not in constraints.txt"
        assert requirement.specifier.contains(version), f"{text} does not allow {version}"
