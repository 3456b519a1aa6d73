"""`python -m fastface_cli` is `fastface`."""

from .cli import main

main()
