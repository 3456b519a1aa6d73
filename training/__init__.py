"""How the pocket stack is made: one module per stage, each a command (``python -m training.vae``)."""
