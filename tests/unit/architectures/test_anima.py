"""Anima: settings read before anything is loaded, files that do not fit, and the VAE in two dimensions."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from anima_train_network import setup_parser
from library.architectures.anima.assembly import build
from library.architectures.anima.layers import ADAPTER
from library.architectures.anima.load import open_loader, with_adapter
from library.architectures.anima.options import AnimaOptions
from library.checkpoints.weights import Quantised, Weights
from library.models.dit_loader import DitLoader
from library.models.vae.qwen_image_2d import ImageConv, StripedNorm
from library.training.models.base_model import hash_module
from library.training.models.requests import RequestedRun
from library.training.planning.counting import count_run
from library.training.planning.meta_run import BatchShape
from tests.running import Finished, tiny_model
from tests.tiny.anima import CONFIG, build_tiny_anima


def options_of(arguments: list[str]) -> AnimaOptions:
    return AnimaOptions.from_args(setup_parser().parse_args(arguments))


def open_tiny(arguments: list[str]) -> DitLoader:
    return open_loader(options_of(arguments))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny_anima_load")


@pytest.fixture(scope="module")
def arguments(folder: Path) -> list[str]:
    return build_tiny_anima(folder, seed=71)


def write_changed_copy(source: Path, target: Path, drop: str = "", rename: tuple[str, str] = ("", "")) -> str:
    """Copy a checkpoint without the weights that match `drop`, replacing the prefix `rename[0]` by `rename[1]`."""
    state = {
        rename[1] + key.removeprefix(rename[0]): tensor
        for key, tensor in load_file(source).items()
        if not drop or not re.search(drop, key)
    }
    save_file(state, target)
    return str(target)


def test_sizes_are_read_from_the_weights(arguments: list[str]) -> None:
    loader, config = open_loader(options_of(arguments))
    assert config == CONFIG
    assert loader.text_encoders()[0].config.rope_parameters["rope_theta"] == 1e6  # type: ignore[union-attr, index]


@pytest.mark.parametrize("prefix", ["net.llm_adapter.", "llm_adapter.", ""])
def test_a_text_adapter_from_a_separate_file_is_used(arguments: list[str], tmp_path: Path, prefix: str) -> None:
    other = build_tiny_anima(tmp_path, seed=72)
    alone = write_changed_copy(
        Path(other[1]), tmp_path / "adapter.safetensors", r"^net\.(?!llm_adapter)", ("net.llm_adapter.", prefix)
    )
    bare = write_changed_copy(Path(arguments[1]), tmp_path / "bare.safetensors", "llm_adapter")
    denoiser = open_tiny([*arguments, "--pretrained_model_name_or_path", bare, "--llm_adapter_path", alone]).denoiser()
    base_weights, adapter_weights = (open_tiny(options).denoiser().state_dict() for options in (arguments, other))
    for key, tensor in denoiser.state_dict().items():
        assert torch.equal(tensor, (adapter_weights if key.startswith("llm_adapter.") else base_weights)[key])


def test_adding_a_text_adapter_keeps_the_storage_formats_of_both_files() -> None:
    def quantised_weights(names: list[str]) -> Weights:
        quantised = {name: Quantised("int8", None, dict) for name in names}
        shapes, padded_to = dict.fromkeys(names, (2, 2)), dict.fromkeys(names, 16)
        return Weights("file", shapes, lambda name: torch.zeros(2, 2), quantised, padded_to=padded_to)

    joined = with_adapter(quantised_weights(["a.weight", f"{ADAPTER}old.weight"]), quantised_weights(["new.weight"]))
    for values in (joined.shapes, joined.quantised, joined.padded_to):
        assert set(values) == {"a.weight", f"{ADAPTER}new.weight"}


# --qwen_image_vae_2d: the VAE of Qwen-Image gives the same results with 2-D as with 3-D convolutions.


vae_arguments = tiny_model("anima", 61)


def build_arch(arguments: list[str], *more: str) -> Any:
    return build(AnimaOptions.from_args(setup_parser().parse_args([*arguments, *more])))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(48, 80), (104, 24)], ids=str)
def test_latents_and_images_match_those_of_the_3d_vae(vae_arguments: list[str], size: tuple[int, int]) -> None:
    """Float64 results agree up to rounding, since only the order of sums differs."""
    pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(62)) * 2 - 1
    results = []
    for flags in ((), ("--qwen_image_vae_2d",)):
        arch = build_arch(vae_arguments, *flags)
        vae = arch.load.vae().double()
        with torch.no_grad():
            moments = vae.quant_conv(vae.encoder(pixels[:, :, None].double()))
            frames = vae.decoder(vae.post_quant_conv(moments[:, :16]))
            vae = vae.float()
            latents = arch.codec.encode(vae, pixels, [])
            results.append((moments, frames, latents, arch.codec.decode(vae, latents)))
    for index, tolerance in enumerate(({"rtol": 1e-10, "atol": 1e-10}, {"rtol": 1e-10, "atol": 1e-10})):
        torch.testing.assert_close(results[1][index], results[0][index], **tolerance)
    for index in (2, 3):
        assert results[0][index].abs().max() > 0.1
        # Float32 sums run in another order: some values near zero were off by 2.4e-5 with two threads.
        torch.testing.assert_close(results[1][index], results[0][index], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_2d_vae_has_the_same_hash_and_runs_no_3d_convolutions(vae_arguments: list[str]) -> None:
    plain, flat = build_arch(vae_arguments).load.vae(), build_arch(vae_arguments, "--qwen_image_vae_2d").load.vae()
    assert hash_module(plain) == hash_module(flat)
    conv3d_names = {name for name, module in flat.named_modules() if isinstance(module, torch.nn.Conv3d)}
    assert conv3d_names and all(name.endswith("time_conv") for name in conv3d_names)
    assert sum(isinstance(module, ImageConv) for module in flat.modules()) > 20


@pytest.mark.slow
def test_the_2d_and_the_3d_vae_share_a_cache(
    train: Any, images: Path, vae_arguments: list[str], tmp_path: Path
) -> None:
    options = [
        *vae_arguments, "--train_data_dir", str(images), "--caption_extension", ".txt", "--resolution", "64",
        "--output_dir", str(tmp_path / "out"), "--network_module", "networks.lora_anima", "--network_dim", "2",
        "--max_train_steps", "1", "--max_data_loader_n_workers", "0", "--qwen3_max_token_length", "16",
        "--t5_max_token_length", "16", "--network_train_unet_only", "--cache_latents_to_disk", "--seed", "3",
    ]  # fmt: skip
    losses = []
    for flags in ([], ["--qwen_image_vae_2d"]):
        done: Finished = train([*options, *flags], script="anima_train_network")
        assert done.status == 0, done.stderr
        losses.append(done.losses)
        files = sorted(images.rglob("*_anima.npz"))
        times = [path.stat().st_mtime_ns for path in files]
        losses[-1] = (losses[-1], times)
    assert losses[0] == losses[1]
    for path in files:
        path.unlink()
    done = train([*options, "--qwen_image_vae_2d"], script="anima_train_network")
    assert done.losses == pytest.approx(losses[0][0], rel=1e-5)
    with np.load(sorted(images.rglob("*_anima.npz"))[0]) as file:
        assert any(name.startswith("latents") for name in file)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 12, 1, 37, 6), (2, 12, 37, 6), (1, 12, 1, 5, 3)], ids=str)
def test_striped_norms_match_unstriped_norms_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageRMS_norm

    g = torch.Generator().manual_seed(63)
    norm = QwenImageRMS_norm(12, images=len(shape) == 4).requires_grad_(False)
    norm.gamma.copy_(torch.randn(norm.gamma.shape, generator=g))
    x = (3 * torch.randn(shape, generator=g)).to(dtype)
    norm = norm.to(dtype)
    assert torch.equal(StripedNorm(norm)(x), norm(x))


@pytest.mark.slow
def test_the_planner_counts_less_memory_for_an_image(vae_arguments: list[str]) -> None:
    command = [
        *vae_arguments, "--cache_latents", "--network_module", "networks.lora_anima", "--network_dim", "2",
        "--network_train_unet_only", "--mixed_precision", "bf16", "--qwen3_max_token_length", "8",
        "--t5_max_token_length", "8",
    ]  # fmt: skip
    rises = []
    for flags in ((), ("--qwen_image_vae_2d",)):
        options = AnimaOptions.from_args(setup_parser().parse_args([*command, *flags]))
        counted = count_run(RequestedRun.resolve(options, build(options)), BatchShape(1, 256, 256), torch.device("cpu"))
        (stage,) = (stage for stage in counted.stages if stage.name == "encoding images")
        rises.append(stage.rise_of_one)
    assert rises[1] < 0.7 * rises[0]
