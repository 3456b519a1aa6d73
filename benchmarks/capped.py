"""Run `fastface` on a GPU as if its memory were smaller: allocations of PyTorch beyond the cap fail.

python benchmarks/capped.py 8 bench --recipe hyper-fastface --weights random --low-memory 8 --no-cold

The first argument is the cap in GiB; the CUDA context, 0.3 to 0.6 GiB, is not part of it.
"""

from __future__ import annotations

import sys

import torch

from fastface_cli.cli import main

if __name__ == "__main__":
    cap = float(sys.argv.pop(1)) * 2**30
    torch.cuda.set_per_process_memory_fraction(cap / torch.cuda.get_device_properties(0).total_memory)
    main()
