"""Checks of this machine and the commands that fix what they report."""
