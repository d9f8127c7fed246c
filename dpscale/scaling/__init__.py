"""Scaling: measure single points, submit sweeps of them, draw curves, predict beyond the machine."""
