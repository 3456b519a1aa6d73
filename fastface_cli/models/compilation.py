"""Compile functions to static graphs: once per shape, cached on disk, replayed as CUDA graphs."""

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
"""Maximum number of graphs of one function: image sizes times branches times recipes."""


def keep_graphs(folder: Path) -> Path:
    """Cache compiled code in a folder, for the next process.

    TORCHINDUCTOR_CACHE_DIR takes precedence if the user has set it. The compiler only uses entries of its own
    version, the same device and the same graph.

    Returns:
        The folder in use.
    """
    chosen = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""))
    # torch sets the variable to a temporary folder when it first needs one.
    if chosen == Path() or (chosen.parent == Path(gettempdir()) and chosen.name.startswith("torchinductor_")):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
        return folder
    return chosen


class Compiled:
    """A function as one graph without breaks.

    Args:
        function: of tensors, to one tensor; other arguments are constants of the graph.
        cuda_graphs: replay the kernels as a CUDA graph; no effect on other devices.
        autotune: choose the fastest of several kernels for every product, which takes minutes.
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
        # With fullgraph=True, exceeding the limit is an error.
        torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
        options: dict[str, Any] = {"triton.cudagraphs": True} if cuda_graphs else {}
        if autotune:
            options |= {"max_autotune": True, "coordinate_descent_tuning": True, "conv_1x1_as_mm": True}
        # A graph for several sizes would be slower for each of them.
        self._function = torch.compile(
            function, fullgraph=True, dynamic=False, backend=backend, options=options or None
        )

    def __call__(self, *args: Any, **named: Any) -> Tensor:
        """Return the result of the function, in its own memory.

        Raises:
            DeviceError: this machine cannot compile it.
        """
        if self.cuda_graphs:
            mark: Any = torch.compiler.cudagraph_mark_step_begin
            mark()
        try:
            result = self._function(*args, **named)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            reason = str(error).strip().splitlines()
            raise DeviceError(
                f"this machine cannot compile the models: {reason[0] if reason else type(error).__name__}",
                "omit --compile; compiling requires g++ on a CPU, Triton on a GPU",
            ) from error
        # A CUDA graph writes every result to the same memory.
        return result.clone() if self.cuda_graphs else result


@functools.cache
def compiled(
    function: Callable[..., Tensor],
    *,
    cuda_graphs: bool = False,
    autotune: bool = False,
    backend: str = "inductor",
) -> Compiled:
    """Return the `Compiled` of a function, which all pipelines of a process share."""
    return Compiled(function, cuda_graphs=cuda_graphs, autotune=autotune, backend=backend)
