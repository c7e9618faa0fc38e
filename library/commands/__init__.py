"""Shared by the commands in tools/: options, adapter files, base models."""
