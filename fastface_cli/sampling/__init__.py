"""Guidance, attention manipulation and the sampling loop."""
