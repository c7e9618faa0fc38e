"""Train a LoRA-family adapter for Stable Diffusion XL."""

import argparse

from library.architectures.sdxl.options import SdxlOptions
from library.launcher import let_idle_threads_sleep
from library.training.command_line.cli import build_parser


def setup_parser() -> argparse.ArgumentParser:
    """Every option of this script; front ends read it."""
    return build_parser(SdxlOptions)


if __name__ == "__main__":
    let_idle_threads_sleep()
    from library.architectures.sdxl.assembly import LATENTS, build
    from library.training.command_line.main import main

    raise SystemExit(main(setup_parser(), SdxlOptions, build, latents=LATENTS))
