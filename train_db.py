"""A script of sd-scripts that is not here; started, it says what is."""

from library.training.command_line.absent import main

if __name__ == "__main__":
    raise SystemExit(main(__file__))
