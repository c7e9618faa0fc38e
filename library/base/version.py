"""The name and version of this suite; pyproject.toml reads the version from here."""

NAME = "lora-training-suite"  # the program name in the metadata of trained files
VERSION = "0.1.0"
