"""Whole runs on a CUDA card."""
