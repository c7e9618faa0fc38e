"""Options kept in a TOML file."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class ConfigFileOptions(Options):
    """Options kept in a TOML file."""

    config_file: str | None = option(
        None,
        help='TOML file with options, one "name = value" a line; .toml may be left out. Sections only group lines, and'
        " what is typed on the command line wins.",
    )
    output_config: bool = option(
        False,
        help="Write the options of this command line that differ from their defaults into the file named by "
        "--config_file, and end. An existing file is not overwritten.",
    )
