"""Static graphs: a function is compiled once per shape, cached on disk, and replayed as a CUDA graph."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from torch import Tensor

from ..errors import DeviceError

GRAPHS = 64
"""Graphs of one function that a process may hold: image sizes times branches times recipes."""


def keep_graphs(folder: Path) -> Path:
    """Keep what is compiled from now on under `folder`, so that the next process need not do it again.

    TORCHINDUCTOR_CACHE_DIR, where the user set it, wins. The compiler checks what it finds there against its
    own version, the device and the graph.

    Returns:
        The folder in use.
    """
    named = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    # torch sets this to a temporary folder when it first needs it.
    if named == Path() or (named.parent == Path(gettempdir()) and named.name.startswith("torchinductor_")):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
        return folder
    return named


class Compiled:
    """A function as one graph without breaks.

    Args:
        function: of tensors, to one tensor; whatever else it takes is part of the graph.
        cuda_graphs: replay the kernels as a CUDA graph; nothing happens on other devices.
        autotune: measure several kernels for every product, which takes minutes.
        backend: of torch.compile.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        *,
        cuda_graphs: bool = False,
        autotune: bool = False,
        backend: str = "inductor",
    ) -> None:
        self.cuda_graphs = cuda_graphs
        # With fullgraph=True, exceeding the limit is an error and not only slow.
        torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
        options: dict[str, Any] = {"triton.cudagraphs": True} if cuda_graphs else {}
        if autotune:
            options |= {"max_autotune": True, "coordinate_descent_tuning": True, "conv_1x1_as_mm": True}
        # Sizes are exact: one graph that fits several would be slower in each.
        self._function = torch.compile(
            function, fullgraph=True, dynamic=False, backend=backend, options=options or None
        )

    def __call__(self, *args: Any, **named: Any) -> Tensor:
        """The function's result, in memory of its own.

        Raises:
            DeviceError: it cannot be compiled here.
        """
        if self.cuda_graphs:
            mark: Any = torch.compiler.cudagraph_mark_step_begin
            mark()
        try:
            result = self._function(*args, **named)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            reason = str(error).strip().splitlines()
            raise DeviceError(
                f"the models cannot be compiled here: {reason[0] if reason else type(error).__name__}",
                "leave out --compile; a compiler needs g++ on a CPU, Triton on a GPU",
            ) from error
        # A CUDA graph writes every result to the same place.
        return result.clone() if self.cuda_graphs else result


@functools.cache
def compiled(
    function: Callable[..., Tensor],
    *,
    cuda_graphs: bool = False,
    autotune: bool = False,
    backend: str = "inductor",
) -> Compiled:
    """The one `Compiled` of a function: graphs are shared by all pipelines of a process."""
    return Compiled(function, cuda_graphs=cuda_graphs, autotune=autotune, backend=backend)
