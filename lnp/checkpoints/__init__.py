"""Runs that are over: saved checkpoints are measured one after the other, into a file as a tracker writes it."""
