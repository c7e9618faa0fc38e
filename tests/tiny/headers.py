"""Full-size checkpoints that take no disk space: a real header, followed by a hole in a sparse file."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

from torch import nn

from tests.contracts.full_size import facts, shapes_of_model

Shapes = Mapping[str, tuple[int, ...]]
BF16_BYTES = 2


def write_header(path: Path, shapes: Shapes) -> str:
    """Write a sparse safetensors file of bfloat16 zeros, with only its header on disk, and return its path."""
    header: dict[str, object] = {}
    start = 0
    for name, shape in shapes.items():
        end = start + BF16_BYTES * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)
    return str(path)


def shapes_of(table: Mapping[str, list[int]], prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(shape) for name, shape in table.items()}


def flux_vae() -> Shapes:
    """Return the VAE of FLUX.1, which several models share."""
    return shapes_of(facts("flux1")["components"]["ae"])


def write_headers(folder: Path, files: Mapping[str, Shapes | nn.Module]) -> list[str]:
    """Write one file for each flag, of these shapes or of a model's, and return the arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        word
        for flag, content in files.items()
        for word in (
            f"--{flag}",
            write_header(
                folder / f"{flag}.safetensors", shapes_of_model(content) if isinstance(content, nn.Module) else content
            ),
        )
    ]
