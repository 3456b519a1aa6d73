"""Logs and errors of diffusers and transformers, reduced to what a user needs."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from .errors import ModelUnavailableError

NO_MEMORY = "out of memory|ALLOC_FAILED|can't allocate memory"
"""How MPS, the CUDA libraries and the CPU allocator report a lack of memory in a plain RuntimeError."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error is a lack of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and re.search(NO_MEMORY, str(error)) is not None
    )


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence loaders: they warn about intended settings (no image encoder), and log what they raise."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    # Not imported here: evaluation does not need diffusers, and it takes seconds.
    diffusers_logging = sys.modules.get("diffusers.utils.logging")
    libraries = [library for library in (diffusers_logging, transformers_logging) if library is not None]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    for library in libraries:
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, shown in zip(libraries, bars, strict=True):
            if shown:
                library.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def loading_errors(part: str, path: Path) -> Iterator[None]:
    """Turn any error of a loader into one sentence that names the file."""
    try:
        yield
    except (ModelUnavailableError, MemoryError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelUnavailableError(
            f"cannot load the {part} from {path}: {_reason(error)}",
            "check that the file is complete and of the right kind: `fastface download --verify`",
        ) from error


def _reason(error: Exception) -> str:
    """Return the message of a loader, without its advice to programmers."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    if isinstance(error, AttributeError | TypeError):
        return "its content has an unexpected structure"
    lines = [line.strip() for line in str(error).strip().splitlines()]
    summary = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    sentence = re.split(r"\.\s", summary, maxsplit=1)[0]
    return sentence[:300].rstrip(".") or type(error).__name__
