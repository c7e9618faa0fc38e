"""The names of the layers of FLUX.2 in adapter files.

Module paths are those of the original checkpoint. ai-toolkit writes them in the generic naming, musubi-tuner in
kohya's, SimpleTuner and OneTrainer write diffusers' paths.
"""

from library.architectures.flux_2.checkpoint_keys import KEYS
from library.checkpoints.adapter_names import BaseNames, ModuleNames, Piece
from library.models.double_stream_keys import SWAPPED

NUM_BLOCKS = {"double_blocks": 8, "single_blocks": 48}  # of dev; klein has fewer


def other_names(path: str) -> tuple[str, ...]:
    """Return other names by which files know a layer of diffusers."""
    return f"diffusion_model.{path}", f"lora_unet_{path.replace('.', '_')}"


def denoiser_module(path: str) -> ModuleNames:
    found = KEYS.sources(path)
    is_whole = len(found) == 1
    return ModuleNames(
        kohya=f"lora_unet_{path.replace('.', '_')}",
        generic=f"diffusion_model.{path}",
        diffusers=f"transformer.{found[0]}"
        if is_whole
        else tuple(Piece(f"transformer.{name}", 1, other_names(name)) for name in found),
        aliases=other_names(found[0]) if is_whole else (),
        swaps_pair=path == SWAPPED,
    )


NAMES = BaseNames("flux_2", tuple(map(denoiser_module, KEYS.linear_paths(NUM_BLOCKS))))
