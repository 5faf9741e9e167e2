"""Runs looked at while they go on, in a terminal, and afterwards, on a page for a browser."""
