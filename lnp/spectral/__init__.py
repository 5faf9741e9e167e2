"""Spectrum, dense kernel and linear operators of a batch."""
