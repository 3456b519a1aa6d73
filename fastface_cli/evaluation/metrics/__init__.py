"""Metrics: what a picture is measured by. `base` says what a metric is; the other files are some."""
