"""Metrics of images. `base` has the interface."""
