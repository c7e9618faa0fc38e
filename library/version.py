"""The version of this suite; pyproject.toml reads it from here."""

VERSION = "0.1.0"
