"""Writes docs/openapi.json, the schema of the native API: python docs/render_openapi.py"""

from __future__ import annotations

import json
from pathlib import Path

from fastface_cli.app.runtime import Runtime
from fastface_cli.server.application import openapi_schema
from fastface_cli.server.studio import Studio, StudioOptions
from fastface_cli.settings import Settings

FILE = Path(__file__).with_name("openapi.json")


def render() -> str:
    """The schema as text."""
    studio = Studio(StudioOptions("pocket"), Runtime("cpu"), Settings())
    return json.dumps(openapi_schema(studio), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
