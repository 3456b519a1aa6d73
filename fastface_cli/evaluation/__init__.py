"""Evaluation: a data set through recipes, measured, with intervals, as a table and a page."""
