"""Z-Image: loading in every layout, and latents."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from library.architectures.zimage.assembly import CODEC, build
from library.architectures.zimage.options import ZImageOptions
from tests.running import Finished, make_images, tiny_model
from tests.tiny.zimage import build_tiny_zimage
from tests.tolerances import FLOAT32_SAME_MATH
from zimage_train_network import setup_parser

tiny = tiny_model("zimage", 3)


def options_of(arguments: list[str]) -> ZImageOptions:
    return ZImageOptions.from_args(setup_parser().parse_args(arguments))


# Recognising Turbo


def test_turbo_without_a_training_adapter_is_warned_about_once(
    tiny: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    turbo, base = (build(options_of([*tiny, "--model_version", version])) for version in ("turbo", "base"))
    assert caplog.text.count("is Z-Image Turbo, which is distilled") == 1
    assert (turbo.preview.defaults.num_steps, turbo.preview.defaults.scale) == (8, 1.0)
    assert (base.preview.defaults.num_steps, base.preview.defaults.scale) == (50, 5.0)
    caplog.clear()
    build(options_of([*tiny, "--model_version", "turbo", "--training_adapter", "adapter.safetensors"]))
    assert "distilled" not in caplog.text


# Z-Image is trained on the mean of the VAE's posterior; caches and states of random samples are not used.


def test_latents_are_the_normalized_mean_as_in_diffusers(tmp_path: Path) -> None:
    vae = build(ZImageOptions.from_args(setup_parser().parse_args(build_tiny_zimage(tmp_path, 3)))).load.vae()
    pixels_BCHW = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        mode_BCHW = vae.encode(pixels_BCHW.to(vae.dtype)).latent_dist.mode().float()  # type: ignore[operator,arg-type]
        actual = CODEC.encode(vae, pixels_BCHW, [torch.Generator().manual_seed(n) for n in range(2)])
    torch.testing.assert_close(actual, (mode_BCHW - 0.1159) * 0.3611, **FLOAT32_SAME_MATH)


@pytest.mark.slow
def test_a_state_of_an_earlier_version_is_refused(train: Callable[..., Finished], tmp_path: Path) -> None:
    data = make_images(tmp_path / "data" / "1_thing", 2).parent
    arguments = [
        *build_tiny_zimage(tmp_path, 3), "--train_data_dir", str(data), "--resolution", "64", "--output_dir",
        str(tmp_path / "out"), "--output_name", "a", "--network_module", "networks.lora", "--network_dim", "2",
        "--max_data_loader_n_workers", "0", "--save_state", "--max_train_steps",
    ]  # fmt: skip
    assert train([*arguments, "1"], "zimage_train_network").status == 0
    state = tmp_path / "out" / "a-state"
    resumed = [*arguments, "2", "--resume", str(state)]
    assert train(resumed, "zimage_train_network").status == 0
    manifest = json.loads((state / "train_state.json").read_text())
    assert manifest["dataset"].pop("latents") == "posterior mean"
    del manifest["digest"]
    manifest["current_step"] = 1
    (state / "train_state.json").write_text(json.dumps(manifest))
    refused = train(resumed, "zimage_train_network")
    assert refused.status == 1
    assert "of an earlier version, which trained this base model on random samples" in refused.stderr
    assert "Traceback" not in refused.stderr
