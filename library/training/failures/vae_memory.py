"""Fallbacks for a VAE that does not fit GPU memory: tiles, then the CPU."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from library.memory.devices import release_memory
from library.training.failures.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Largest tile side in pixels. diffusers takes a side from the configuration: single files lack it, and for some it is
# 1024, which leaves an image of that size whole. Tiles overlap by a quarter and are blended; each is processed
# separately, so colours may differ slightly between tiles.
TILE = 512


class VaeFallback:
    """Runs a VAE; if GPU memory runs out, runs it again in tiles, then on the CPU.

    A fallback that was needed once is used at once the next time.
    """

    def __init__(self) -> None:
        self._ways: list[Callable[[nn.Module], AbstractContextManager[Any]]] = [nullcontext, tile_vae, on_cpu]

    def run(self, vae: nn.Module, compute: Callable[[], T]) -> T:
        """Return `compute()`, which uses the VAE on its current device; the VAE is restored afterwards.

        Raises the error of the last attempt.
        """
        is_on_gpu = next(vae.parameters()).device.type == "cuda"
        while True:
            try:
                with self._ways[0](vae):
                    return compute()
            except (RuntimeError, MemoryError) as error:
                if not (is_on_gpu and len(self._ways) > 1 and is_out_of_memory(error)):
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            # Outside the handler, because the error's traceback keeps the attempt's tensors alive.
            self._ways.pop(0)
            logger.warning("the GPU has too little memory for the VAE: it works %s (%s)", WORDS[self._ways[0]], reason)
            release_memory()


@contextmanager
def tile_vae(vae: nn.Module) -> Iterator[None]:
    """Make a VAE of diffusers compute in overlapping tiles."""
    from diffusers import AutoencoderKL

    model: Any = vae
    tile_sizes: dict[str, int] = {}
    side = vars(model).get("tile_sample_min_size", 0)
    if isinstance(model, AutoencoderKL) or side > TILE:
        downscale = 2 ** (len(model.config.block_out_channels) - 1)
        tile_sizes = {"tile_sample_min_size": TILE, "tile_latent_min_size": TILE // downscale}
    before = {name: getattr(model, name) for name in tile_sizes}
    vars(model).update(tile_sizes)
    model.enable_tiling()
    try:
        yield
    finally:
        model.disable_tiling()
        vars(model).update(before)


@contextmanager
def on_cpu(vae: nn.Module) -> Iterator[None]:
    device = next(vae.parameters()).device
    vae.to("cpu")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        vae.to(device)


WORDS: dict[Any, str] = {tile_vae: "in tiles of the image", on_cpu: "on the CPU, which is slow"}
