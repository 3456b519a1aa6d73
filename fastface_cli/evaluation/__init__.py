"""Evaluate recipes on a data set: generate, score, summarize with confidence intervals, and report."""
