"""Which programs read a file that a run has saved."""

from collections.abc import Sequence
from pathlib import Path

from library.checkpoints.base_model_spec import BaseModelSpec
from library.checkpoints.compatibility import describe, readings
from library.checkpoints.headers import is_safetensors
from library.checkpoints.weights import open_safetensors


def readers_line(specs: Sequence[BaseModelSpec], path: Path) -> str | None:
    """Describe how many keys a file has and which programs read them; None if that is unknown."""
    if not is_safetensors(path):
        return None
    try:
        weights = open_safetensors(path)
        # For OFT the value of alpha, not only its key, decides which programs read the file.
        alpha_keys = [
            f"{key.removesuffix('.oft_blocks')}.alpha" for key in weights.shapes if key.endswith(".oft_blocks")
        ]
        alphas = {key: float(weights.read(key)) for key in alpha_keys if weights.shapes.get(key) == ()}
    except (OSError, ValueError) as error:  # a third-party network may write any content
        return f"its keys cannot be read back: {error}"
    readers = readings(specs, weights.shapes, weights.metadata, alphas)
    return f"{len(weights.shapes)} keys, {describe(readers)}" if readers else None
