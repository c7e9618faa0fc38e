"""Latents are sampled from the VAE's posterior, each with its own generator."""

import pytest
import torch

from tests.tolerances import EXACT, FLOAT32_DEEP, FLOAT32_SAME_MATH


@pytest.fixture
def pixels_BCHW() -> torch.Tensor:
    return torch.rand(3, 3, 64, 128, generator=torch.Generator().manual_seed(41)) * 2 - 1


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_latent_is_the_mean_plus_deviation_times_its_own_noise(open_sd, tiny_sd_folder, pixels_BCHW):
    arch = open_sd(tiny_sd_folder)
    vae = arch.load.vae()
    actual_BCHW = arch.codec.encode(vae, pixels_BCHW, generators(3, 4, 5))
    posterior = vae.encode(pixels_BCHW).latent_dist
    for b, seed in enumerate((3, 4, 5)):
        noise_CHW = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(seed))
        expected_CHW = posterior.mean[b] + torch.exp(0.5 * posterior.logvar[b]) * noise_CHW
        torch.testing.assert_close(actual_BCHW[b], expected_CHW, **FLOAT32_SAME_MATH)


def test_a_latent_does_not_depend_on_the_rest_of_its_batch(open_sd, tiny_sd_folder, pixels_BCHW):
    arch = open_sd(tiny_sd_folder)
    vae = arch.load.vae()
    together = arch.codec.encode(vae, pixels_BCHW, generators(6, 7, 8))[1:2]
    alone = arch.codec.encode(vae, pixels_BCHW[1:2], generators(7))
    torch.testing.assert_close(together, alone, **FLOAT32_DEEP)


def test_decoding_undoes_scaling(open_sd, tiny_sd_folder):
    arch = open_sd(tiny_sd_folder)
    vae = arch.load.vae()
    latents_BCHW = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(42))
    assert torch.equal(arch.codec.normalize(latents_BCHW), latents_BCHW * 0.18215)
    decoded = arch.codec.decode(vae, arch.codec.normalize(latents_BCHW))
    torch.testing.assert_close(decoded, vae.decode(latents_BCHW).sample, **FLOAT32_DEEP)


def test_a_half_precision_vae_returns_float32(open_sd, tiny_sd_folder, pixels_BCHW):
    arch = open_sd(tiny_sd_folder, "bf16")
    vae = arch.load.vae()
    latents_BCHW = arch.codec.encode(vae, pixels_BCHW, generators(1, 2, 3))
    assert latents_BCHW.dtype == torch.float32
    assert arch.codec.decode(vae, latents_BCHW).dtype == torch.float32
    full = open_sd(tiny_sd_folder)
    expected = full.codec.encode(full.load.vae(), pixels_BCHW, generators(1, 2, 3))
    torch.testing.assert_close(latents_BCHW, expected, rtol=0.1, atol=0.1)


def test_the_cache_uses_the_file_suffix_and_keys_of_sd_scripts(open_sd, tiny_sd_folder):
    spec = open_sd(tiny_sd_folder).codec.spec
    assert (spec.cache_suffix, spec.had_keys_without_size) == ("_sd.npz", True)
    assert (spec.channels, spec.downscale, spec.bucket_step) == (4, 8, 64)


def test_encoding_is_deterministic(open_sd, tiny_sd_folder, pixels_BCHW):
    arch = open_sd(tiny_sd_folder)
    vae = arch.load.vae()
    first, second = (arch.codec.encode(vae, pixels_BCHW, generators(1, 2, 3)) for _ in range(2))
    torch.testing.assert_close(first, second, **EXACT)
