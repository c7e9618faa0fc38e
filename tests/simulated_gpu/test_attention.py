"""Attention reports the kernel that CUDA would choose; the expected ones follow torch's sdp_utils.cpp."""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from library.models.vae.latents import KlLatents
from library.protocols import LatentSpec
from library.training.failures import vae_memory
from library.training.failures.vae_memory import VaeFallback
from library.training.models import base_model
from tests.simulated_gpu.device import Simulation
from tests.tiny.flux import VAE

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("simulated_gpu")]
GPU = torch.device("cuda")
HALF, BFLOAT, FLOAT = torch.float16, torch.bfloat16, torch.float32


def heads(size: int = 64, dtype: torch.dtype = BFLOAT, num: int = 2, length: int = 6, grad: bool = False) -> Tensor:
    return torch.ones(1, num, length, size, device=GPU, dtype=dtype, requires_grad=grad)


def chosen_kernel(simulated_gpu: Simulation, q: Tensor, k: Tensor, v: Tensor, **named: Any) -> str:
    """Return the kernel's name."""
    simulated_gpu.clear()
    scaled_dot_product_attention(q, k, v, **named)
    ((text, count),) = simulated_gpu.attention().items()
    assert count == 1 and "at tests/simulated_gpu/test_attention.py:" in text
    return text.partition(" at ")[0].partition(":")[0]


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "grad", "kernel"),
    [
        (8.9, BFLOAT, 64, True, "flash"),
        (8.9, HALF, 40, True, "flash"),  # head size of SD 1.5, which flash pads
        (8.9, FLOAT, 64, True, "efficient"),
        (8.9, BFLOAT, 200, True, "efficient"),  # flash has no backward pass for this size on small chips
        (8.9, BFLOAT, 200, False, "flash"),
        (8.9, BFLOAT, 256, True, "flash"),
        (8.9, BFLOAT, 512, True, "efficient"),  # head size of a VAE
        (8.9, BFLOAT, 516, True, "math"),  # not a multiple of 8
        (7.5, HALF, 64, True, "efficient"),
        (7.5, FLOAT, 64, True, "efficient"),
        (7.5, BFLOAT, 64, True, "math"),
        (7.5, HALF, 20, True, "math"),
        (7.5, FLOAT, 21, True, "efficient"),
        (8.9, torch.float64, 64, True, "math"),
    ],
)
def test_the_kernel_follows_capability_dtype_and_head_size(
    simulated_gpu: Simulation, capability: float, dtype: torch.dtype, size: int, grad: bool, kernel: str
) -> None:
    x = heads(size, dtype, grad=grad)
    with simulated_gpu.configured(capability=capability):
        assert chosen_kernel(simulated_gpu, x, x, x) == kernel


def test_a_mask_excludes_flash(simulated_gpu: Simulation) -> None:
    x = heads()
    mask = torch.ones(1, 1, 6, 6, device=GPU, dtype=torch.bool)
    assert chosen_kernel(simulated_gpu, x, x, x, attn_mask=mask) == "efficient"
    spread = torch.zeros(1, 1, 6, 1, device=GPU, dtype=BFLOAT).expand(1, 1, 6, 6)  # the last stride is not 1
    assert chosen_kernel(simulated_gpu, x, x, x, attn_mask=spread) == "math"


def test_the_kernel_depends_on_shapes(simulated_gpu: Simulation) -> None:
    x = heads()
    assert chosen_kernel(simulated_gpu, x, heads(length=4), heads(length=4), is_causal=True) == "efficient"
    assert chosen_kernel(simulated_gpu, x[0], x[0], x[0]) == "math"
    assert chosen_kernel(simulated_gpu, heads(num=4), x, x, enable_gqa=True) == "flash"
    assert chosen_kernel(simulated_gpu, x, x, heads(128)) == "efficient"
    sideways = torch.ones(1, 2, 64, 6, device=GPU, dtype=BFLOAT).transpose(2, 3)
    assert chosen_kernel(simulated_gpu, sideways, x, x) == "math"
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        assert chosen_kernel(simulated_gpu, x, x, x) == "efficient"
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), pytest.raises(RuntimeError, match="No available kernel"):
        scaled_dot_product_attention(heads(dtype=FLOAT), heads(dtype=FLOAT), heads(dtype=FLOAT))


def test_a_call_that_falls_back_is_reported_with_its_shapes(simulated_gpu: Simulation) -> None:
    x = heads(dtype=torch.float64)
    simulated_gpu.clear()
    scaled_dot_product_attention(x, x, x)
    (text,) = simulated_gpu.attention()
    assert text.startswith("math: query Double [1, 2, 6, 64], key Double [1, 2, 6, 64], value Double [1, 2, 6, 64] at ")


# A VAE on a GPU that has too little memory for it.

SIDE, TILE = 384, 128  # sixteen overlapping tiles
CODEC = KlLatents(
    LatentSpec(channels=16, downscale=8, bucket_step=16, cache_suffix="_x.npz", had_keys_without_size=False),
    0.3611,
    0.1159,
)
NEAR = 0.2  # mean difference in standard deviations, for noise in tiles of 16 latents; unrelated images have 1.1


def tiny_vae() -> torch.nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(131)
    return AutoencoderKL(**VAE).requires_grad_(False).eval().to(GPU)


@contextmanager
def free_memory(simulated_gpu: Simulation, num_bytes: int) -> Iterator[None]:
    """Allow this many bytes to be allocated in addition to the current ones."""
    gc.collect()
    torch.cuda.empty_cache()
    simulated_gpu.limit_memory(torch.cuda.memory_reserved() + num_bytes)
    try:
        yield
    finally:
        simulated_gpu.limit_memory(simulated_gpu.settings.memory_bytes)


def peak_of(run: Callable[[], object]) -> int:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    run()
    return torch.cuda.max_memory_reserved() - before


def test_every_vae_splits_an_image_of_1024_pixels() -> None:
    import diffusers

    with torch.device("meta"):
        models: list[Any] = [
            diffusers.AutoencoderKL(),
            diffusers.AutoencoderKLFlux2(),
            diffusers.AutoencoderKLQwenImage(),
        ]
    for model in models:
        before = dict(vars(model))
        with vae_memory.tile_vae(model):
            tile = vars(model).get("tile_sample_min_size") or model.tile_sample_min_height
            assert model.use_tiling and tile <= 512
            if "tile_latent_min_size" in vars(model):
                scale = 2 ** (len(model.config.block_out_channels) - 1)
                assert model.tile_sample_min_size == scale * model.tile_latent_min_size
        assert vars(model) == before


@torch.no_grad()
def test_a_preview_is_decoded_in_tiles_then_on_the_cpu(
    simulated_gpu: Simulation, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae_memory, "TILE", TILE)
    vae = tiny_vae()
    latents_BCHW = torch.randn(1, 16, SIDE // 8, SIDE // 8, device=GPU)

    def decode() -> Tensor:
        return CODEC.decode(vae, latents_BCHW)

    untiled = decode().cpu()
    peak = peak_of(decode)
    fallback = VaeFallback()
    with free_memory(simulated_gpu, peak // 2), caplog.at_level(logging.WARNING):
        tiled = fallback.run(vae, decode).cpu()
        assert torch.equal(fallback.run(vae, decode).cpu(), tiled)
    assert caplog.text.count("it works in tiles of the image (CUDA out of memory") == 1
    assert not torch.equal(tiled, untiled) and (tiled - untiled).abs().mean() < NEAR * untiled.std()
    with free_memory(simulated_gpu, peak // 20):
        torch.testing.assert_close(fallback.run(vae, decode).cpu(), untiled, atol=1e-5, rtol=1e-4)
    assert "it works on the CPU, which is slow" in caplog.text
    assert next(vae.parameters()).device.type == "cuda" and not vae.use_tiling
    assert torch.equal(decode().cpu(), untiled), "the VAE is as it was"


@torch.no_grad()
def test_a_vae_that_moves_to_the_cpu_has_arrived_before_it_is_used(simulated_gpu: Simulation) -> None:
    """Images to encode are in main memory already, so nothing else waits for the copies."""
    vae = tiny_vae()
    weights = [weight.cpu() for weight in vae.parameters()]
    with vae_memory.on_cpu(vae):
        assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), weights, strict=True))


@torch.no_grad()
def test_an_error_other_than_out_of_memory_is_raised(simulated_gpu: Simulation) -> None:
    def fails() -> None:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match=r"^shapes do not fit$"):
        VaeFallback().run(tiny_vae(), fails)


def test_a_retry_after_out_of_memory_uses_the_same_noise(
    simulated_gpu: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt draws the posterior's noise and runs out of memory; the retry on the CPU draws it again."""
    encode = prepared_encode(monkeypatch)
    pixels_BCHW = torch.rand(2, 3, 64, 64)
    plain = encode(pixels_BCHW, [torch.Generator().manual_seed(seed) for seed in (3, 4)])
    attempts: list[None] = []

    def runs_out(*given: object) -> Tensor:
        latents_BCHW = CODEC_ENCODE(CODEC, *given)
        attempts.append(None)
        if len(attempts) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return latents_BCHW

    monkeypatch.setattr(KlLatents, "encode", lambda self, *given: runs_out(*given))
    again = encode(pixels_BCHW, [torch.Generator().manual_seed(seed) for seed in (3, 4)])
    torch.testing.assert_close(again, plain, atol=1e-5, rtol=1e-4)
    assert len(attempts) == 3


CODEC_ENCODE: Any = KlLatents.encode


def prepared_encode(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """Return the function with which latents are cached."""
    taken: list[Any] = []
    monkeypatch.setattr(base_model, "cache_latents", lambda plan, encode, *_: taken.append(encode))
    processes: Any = SimpleNamespace(device=GPU)
    nothing: Any = None
    base_model.encode_images(tiny_vae, CODEC, nothing, 0, nothing, processes)
    encode_function: Callable[..., Tensor] = taken[0]
    return encode_function
