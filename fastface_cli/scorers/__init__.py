"""Models that score images, for best-of and for evaluation."""
