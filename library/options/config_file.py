"""Options kept in a TOML file."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class ConfigFileOptions(Options):
    """Options kept in a TOML file."""

    config_file: str | None = option(None, help="")
    output_config: bool = option(False, help="")
