"""The facts of Knots, a made-up base model, for the suites: the file tests/tiny/knots.py of a copy of the project."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from library.architectures.knots.layers import view
from library.architectures.knots.load import DENOISER_PREFIX, TEXT_PREFIX
from library.architectures.knots.model import ByteEncoder, Knots, KnotsConfig
from library.checkpoints.saving import save_safetensors
from tests.tiny.base import Base, Deep, path_argument
from tests.tiny.headers import write_headers
from tests.tiny.init import fixed_init
from tests.tiny.keys import kohya, peft
from tests.tiny.parts import prefixed, tiny_denoiser
from tests.tiny.sd import VAE, vae_tensors

CONFIG = KnotsConfig(channels=4, width=24, num_knots=6)
FULL_SIZE = KnotsConfig(channels=4, width=3000, num_knots=8)


def build_tiny_knots(folder: Path, seed: int) -> Path:
    """Write a tiny model, a checkpoint with a Stable Diffusion VAE, and return its path."""
    from diffusers import AutoencoderKL

    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        vae, encoder = AutoencoderKL(**VAE), ByteEncoder(CONFIG.width)
    denoiser = tiny_denoiser(Knots, CONFIG, seed).state_dict()
    text = prefixed(TEXT_PREFIX, fixed_init(encoder, seed + 1))
    tensors = {**prefixed(DENOISER_PREFIX, denoiser), **text, **vae_tensors(fixed_init(vae, seed + 2))}
    save_safetensors(folder / "knots.safetensors", tensors, {})
    return folder / "knots.safetensors"


def write_full_size(folder: Path) -> list[str]:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        parts = {DENOISER_PREFIX: Knots(FULL_SIZE), TEXT_PREFIX: ByteEncoder(FULL_SIZE.width)}
        vae = AutoencoderKL(**VAE)
    tensors = {**vae_tensors(vae.state_dict())}
    for prefix, part in parts.items():
        tensors |= prefixed(prefix, part.state_dict())
    return write_headers(folder, {"pretrained_model_name_or_path": {n: tuple(t.shape) for n, t in tensors.items()}})


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, timesteps and text."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, CONFIG.channels, 8, 6, generator=generator)
    return latents, torch.tensor([125.0, 875.0]), torch.randn(2, 7, CONFIG.width, generator=generator)


BASES = (
    Base(
        name="knots",
        script="knots_train_network",
        module="networks.lora",
        build=lambda folder: path_argument(build_tiny_knots(folder, 971), "--max_bytes", "16"),
        adapts_text_encoders=True,
        written=("knots1", "knots-1"),
        runs={},
        deeper={"num_knots": 8},
        count_share=0.15,  # its blocks hold little besides what the counter leaves out
        deep=Deep(lambda: Knots(replace(CONFIG, num_knots=8)), inputs, view, most_graphs=2),
        full_size={"Knots 1": (512, write_full_size)},
        readers=(
            ("knots kohya", "ANNNN", kohya("unet.knots.0.mix", 6000)),
            ("knots generic", "ANNNN", peft("diffusion_model.knots.1.lift", 3000)),
        ),
    ),
)
