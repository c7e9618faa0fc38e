"""The measured pipeline gives the loss of the families that are written by hand, on the same weights."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from library.architectures.any_pipeline.conditioning import CapturedText
from library.architectures.any_pipeline.measuring import measure
from library.architectures.any_pipeline.training import PipelineLatents, PipelinePredict
from library.architectures.any_pipeline.trees import leaves
from library.architectures.any_pipeline.watch import watch_pipeline
from library.types import Batch, Conditioning

pytestmark = pytest.mark.nightly

CAPTION, HEIGHT, WIDTH = "a red cat", 128, 64
BATCH = Batch(
    keys=["a"], captions=[CAPTION], pixels_BCHW=None, latents_BCHW=None, conditioning=None,
    loss_weights_B=torch.ones(1), masks_B1HW=None, sizes_B6=torch.tensor([[HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH]]),
    attributes=[{}],
)  # fmt: skip
Family = tuple[Any, Any, dict[str, Any]]
"""(our run, diffusers' pipeline on the same weights, options of the pipeline)."""


def parity(name: str) -> Any:
    return importlib.import_module(f"tests.parity.{name}")


def tiny(name: str) -> Any:
    return importlib.import_module(f"tests.tiny.{name}")


def bundle(arch: Any, denoiser: nn.Module, encoders: Any) -> Any:
    return SimpleNamespace(arch=arch, models=SimpleNamespace(denoiser=denoiser, text_encoders=encoders))


def zimage(folder: Path) -> Family:
    tiny("zimage").build_tiny_zimage(folder, 9, "diffusers")
    tests = parity("test_zimage_pipeline")
    return tests.run_of(folder), tests.pipeline_of(folder), {}


def krea2(folder: Path) -> Family:
    tiny("krea2").build_tiny_krea2(folder, 9, "diffusers")
    tests = parity("test_krea2_pipeline")
    return tests.run_of(folder), tests.pipeline_of(folder, False), {}


def flux(folder: Path) -> Family:
    tests = parity("test_flux_preview")
    words = tiny("flux").build_tiny_flux(folder, 9, "diffusers", True)
    options = {"max_sequence_length": tests.NUM_TOKENS}
    return tests.run_of([*words, "--guidance_scale", "1.0"]), tests.pipeline_of(folder, True), options


def lumina(folder: Path) -> Family:
    tests = parity("test_lumina_preview")
    tiny("lumina").build_tiny_lumina(folder, 9, "diffusers")
    run = tests.run_of(["--pretrained_model_name_or_path", str(folder)])
    return run, tests.pipeline_of(folder), {"max_sequence_length": tests.NUM_TOKENS, "system_prompt": tests.SYSTEM}


def sd(folder: Path) -> Family:
    from diffusers import StableDiffusionPipeline

    from library.architectures.sd.assembly import build
    from library.options.model import ModelOptions
    from library.options.train import TrainOptions

    file = tiny("sd").build_tiny_sd(folder, 9)
    arch = build(TrainOptions(model=ModelOptions(pretrained_model_name_or_path=str(file))))
    pipe = StableDiffusionPipeline.from_pretrained(file, safety_checker=None, feature_extractor=None)
    return bundle(arch, arch.load.denoiser(), arch.load.text_encoders()), pipe, {}


def sdxl(folder: Path) -> Family:
    from diffusers import StableDiffusionXLPipeline

    file = tiny("sdxl").build_tiny_sdxl(folder, 9)
    arch = parity("test_sd2_sdxl_load").open_sdxl(file, True)
    pipe = StableDiffusionXLPipeline.from_pretrained(file, add_watermarker=False)
    return bundle(arch, arch.load.denoiser(), arch.load.text_encoders()), pipe, {}


FAMILIES: Mapping[str, Callable[[Path], Family]] = {
    "zimage": zimage, "krea2": krea2, "flux": flux, "lumina": lumina, "sd": sd, "sdxl": sdxl,
}  # fmt: skip


def measured_parts(pipe: Any, options: dict[str, Any]) -> tuple[PipelinePredict, PipelineLatents, Conditioning]:
    watched = watch_pipeline(pipe)
    convention, maps = measure(watched, (64, 64), **options)
    names = tuple(name for name in watched.models if name not in (convention.denoiser, watched.vae))
    example = {path: leaves(maps.kwargs)[path] for path in convention.text}
    text = CapturedText(watched, convention, names, example, None, 0, torch.float32)
    conditioning = text.encode([watched.models[name] for name in names], text.tokenize([CAPTION]))
    spec: Any = SimpleNamespace(downscale=convention.downscale)
    return PipelinePredict(watched, convention, text), PipelineLatents(spec, convention), conditioning


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_latents_prediction_and_loss_are_those_of_the_family(name: str, tmp_path: Path) -> None:
    run, pipe, options = FAMILIES[name](tmp_path)
    arch = run.arch
    for model in (*pipe.components.values(), run.models.denoiser, *run.models.text_encoders):
        if isinstance(model, nn.Module):
            model.eval().requires_grad_(False)
    predict, codec, conditioning = measured_parts(pipe, options)
    vae = arch.load.vae().eval()
    channels = 4 if arch.codec.spec.has_alpha else 3
    pixels = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 - 1
    rgba = torch.cat([pixels, torch.ones(1, channels - 3, HEIGHT, WIDTH)], 1)
    clean = arch.codec.normalize(arch.codec.encode(vae, rgba, None))
    measured = codec.normalize(codec.encode(predict.watched.models[predict.watched.vae], rgba, None))
    torch.testing.assert_close(measured, clean, rtol=1e-5, atol=1e-5)
    noised = arch.objective.at_timestep(500).corrupt(clean, torch.Generator().manual_seed(2))
    own = arch.text.encode(run.models.text_encoders, arch.text.tokenize([CAPTION]))
    estimate = arch.objective.estimate(arch.predict(run.models.denoiser, noised, own, BATCH), noised).float()
    prediction = predict(getattr(pipe, predict.convention.denoiser), noised, conditioning, BATCH)
    target = arch.objective.target(noised)
    sign = -1.0 if torch.equal(target, noised.clean_BCHW - noised.noise_BCHW) else 1.0
    require_close(prediction, sign * estimate)
    loss, expected = float(mse_loss(prediction, sign * target)), float(mse_loss(estimate, target))
    assert loss == pytest.approx(expected, rel=1e-5)


def require_close(actual: Tensor, expected: Tensor) -> None:
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-4
