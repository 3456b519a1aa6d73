"""Fault injection: `python -m tests.faults` runs every script of this folder and prints a table."""
