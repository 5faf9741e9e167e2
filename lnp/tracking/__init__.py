"""Watching a training run: the tracker, its schedule of measurements, and the history that it writes."""
