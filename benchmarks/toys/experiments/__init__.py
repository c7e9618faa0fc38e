"""Comparisons on the toy world: one module for each table of `benchmarks/toys/evidence.py`."""
