"""The measured pipeline gives the loss of the families that are written by hand, on the same weights."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, pixel_shuffle

from library.architectures.any_pipeline.assembly import read_latent_spec
from library.architectures.any_pipeline.check import check, require_exact
from library.architectures.any_pipeline.conditioning import CapturedText
from library.architectures.any_pipeline.convention import Convention
from library.architectures.any_pipeline.maps import SizeMaps
from library.architectures.any_pipeline.measuring import measure
from library.architectures.any_pipeline.training import PipelineLatents, PipelinePredict
from library.architectures.any_pipeline.trees import leaves
from library.architectures.any_pipeline.watch import Watched
from library.types import Batch, Conditioning
from tests.tiny.pipelines import watch_pipeline

CAPTION, HEIGHT, WIDTH = 'a red "cat"', 128, 64
BATCH = Batch(
    keys=["a"], captions=[CAPTION], pixels_BCHW=None, latents_BCHW=None, conditioning=None,
    loss_weights_B=torch.ones(1), masks_B1HW=None, sizes_B6=torch.tensor([[HEIGHT, WIDTH, 0, 0, HEIGHT, WIDTH]]),
    attributes=[{}],
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Family:
    """A model that is written by hand, and diffusers' pipeline with the same weights."""

    run: Any
    pipe: Any
    options: Mapping[str, Any] = field(default_factory=dict)  # of the pipeline's call
    convert: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] = dict  # of our tensors to diffusers' names


def parity(name: str) -> Any:
    return importlib.import_module(f"tests.parity.{name}")


def tiny(name: str) -> Any:
    return importlib.import_module(f"tests.tiny.{name}")


def reference(name: str) -> Any:
    return importlib.import_module(f"library.architectures.{name}.reference")


def bundle(arch: Any, denoiser: nn.Module, encoders: Any) -> Any:
    return SimpleNamespace(arch=arch, models=SimpleNamespace(denoiser=denoiser, text_encoders=encoders))


def in_folder(name: str, *more: Any) -> Callable[[Path], Family]:
    """Return a function that builds a family whose folder both read. `more` goes to the builder of the pipeline."""

    def build(folder: Path) -> Family:
        getattr(tiny(name), f"build_tiny_{name}")(folder, 9, "diffusers")
        tests = parity(f"test_{name}_pipeline")
        return Family(tests.run_of(folder), tests.pipeline_of(folder, *more), convert=split_layers(name))

    return build


def split_layers(name: str) -> Callable[[dict[str, Tensor]], Mapping[str, Tensor]]:
    """Return the function that renames and splits tensors of the denoiser as diffusers has them."""
    convert = getattr(reference(name), "diffusers_state", lambda state, config: state)
    return lambda state: convert(state, tiny(name).CONFIG)  # type: ignore[no-any-return]


def flux(folder: Path) -> Family:
    tests = parity("test_flux_preview")
    words = tiny("flux").build_tiny_flux(folder, 9, "diffusers", True)
    options = {"max_sequence_length": tests.NUM_TOKENS}
    run = tests.run_of([*words, "--guidance_scale", "1.0"])
    return Family(run, tests.pipeline_of(folder, True), options, split_layers("flux"))


def lumina(folder: Path) -> Family:
    tests = parity("test_lumina_preview")
    words = tiny("lumina").build_tiny_lumina(folder, 9, "diffusers")
    options = {"max_sequence_length": tests.NUM_TOKENS, "system_prompt": tests.SYSTEM}
    return Family(tests.run_of(words), tests.pipeline_of(folder), options, split_layers("lumina"))


def sd3(folder: Path) -> Family:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    from library.architectures.sd3.assembly import build

    tests = parity("test_sd3_preview")
    files = tiny("sd3").build_tiny_sd3(folder, 9, "sd3.5-medium")
    arch = build(tests.options_of(files, t5xxl_max_token_length=tests.NUM_TOKENS))
    run = bundle(arch, arch.load.denoiser(), arch.load.text_encoders())
    pipe = tests.pipeline_of(arch, run.models.denoiser, run.models.text_encoders, folder)
    pipe.vae.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
    prefix = "model.diffusion_model."
    weights = run.models.denoiser.state_dict()

    def convert(state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        every = {prefix + key: state.get(key, torch.zeros_like(weight)) for key, weight in weights.items()}
        return convert_sd3_transformer_checkpoint_to_diffusers(every)  # type: ignore[no-any-return]

    return Family(run, pipe, {"max_sequence_length": tests.NUM_TOKENS}, convert)


def hunyuan_image(folder: Path) -> Family:
    from hunyuan_image_train_network import setup_parser
    from library.architectures.hunyuan_image.assembly import build
    from library.architectures.hunyuan_image.options import HunyuanImageOptions

    tests = parity("test_hunyuan_image_parts")
    words = tiny("hunyuan_image").build_tiny_hunyuan_image(folder, tests.SEED)
    arch = build(HunyuanImageOptions.from_args(setup_parser().parse_args(words)))
    run = bundle(arch, arch.load.denoiser(), arch.load.text_encoders())
    return Family(run, tests.pipeline_of(folder), convert=split_layers("hunyuan_image"))


def sd(folder: Path) -> Family:
    from diffusers import StableDiffusionPipeline

    from library.architectures.sd.assembly import build
    from library.options.model import ModelOptions
    from library.options.train import TrainOptions

    file = tiny("sd").build_tiny_sd(folder, 9)
    arch = build(TrainOptions(model=ModelOptions(pretrained_model_name_or_path=str(file))))
    pipe = StableDiffusionPipeline.from_pretrained(file, safety_checker=None, feature_extractor=None)
    return Family(bundle(arch, arch.load.denoiser(), arch.load.text_encoders()), pipe)


def sdxl(folder: Path) -> Family:
    from diffusers import StableDiffusionXLPipeline

    file = tiny("sdxl").build_tiny_sdxl(folder, 9)
    arch = parity("test_sd2_sdxl_load").open_sdxl(file, True)
    pipe = StableDiffusionXLPipeline.from_pretrained(file, add_watermarker=False)
    return Family(bundle(arch, arch.load.denoiser(), arch.load.text_encoders()), pipe)


FAMILIES: Mapping[str, Callable[[Path], Family]] = {
    "sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux, "flux_2": in_folder("flux_2", False), "lumina": lumina,
    "hunyuan_image": hunyuan_image, "zimage": in_folder("zimage"), "krea2": in_folder("krea2", False),
    "qwen_image_21": in_folder("qwen_image_21"),
}  # fmt: skip
MARKS: Mapping[str, Any] = {"lumina": ()}


def parts_of(
    watched: Watched, convention: Convention, maps: SizeMaps
) -> tuple[PipelinePredict, PipelineLatents, Conditioning]:
    """Return what trains a measured pipeline, and its caption encoded."""
    names = tuple(name for name in watched.models if name not in (convention.denoiser, watched.vae))
    example = {path: leaves(maps.kwargs)[path] for path in convention.text}
    text = CapturedText(watched, convention, names, example, None, 0, torch.float32)
    conditioning = text.encode([watched.models[name] for name in names], text.tokenize([CAPTION]))
    spec: Any = SimpleNamespace(downscale=convention.downscale)
    return PipelinePredict(watched, convention, text), PipelineLatents(spec, convention), conditioning


@pytest.mark.parametrize("name", [pytest.param(n, marks=MARKS.get(n, pytest.mark.nightly)) for n in FAMILIES])
def test_latents_loss_and_gradients_are_those_of_the_family(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter's gradient is the weight's gradient, multiplied by the other matrix of the adapter."""
    family = FAMILIES[name](tmp_path)
    arch, models = family.run.arch, family.run.models
    for model in (*family.pipe.components.values(), models.denoiser, *models.text_encoders):
        if isinstance(model, nn.Module):
            model.eval().requires_grad_(False)
    watched = watch_pipeline(family.pipe)
    monkeypatch.setattr(watched, "draw", partial(watched.draw, **family.options))
    convention, maps = measure(watched, (64, 64))
    require_exact(check(watched, convention, maps))
    predict, codec, conditioning = parts_of(watched, convention, maps)
    assert read_latent_spec(convention).has_alpha == arch.codec.spec.has_alpha
    channels = 4 if arch.codec.spec.has_alpha else 3
    pixels = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 - 1
    rgba = torch.cat([pixels, torch.ones(1, channels - 3, HEIGHT, WIDTH)], 1)
    clean = arch.codec.normalize(arch.codec.encode(arch.load.vae().eval(), rgba, None))
    measured = codec.normalize(codec.encode(watched.models[watched.vae], rgba, None))
    packs = clean.shape != measured.shape  # FLUX.2's own script has patches of two as channels

    def unpack(latents: Tensor) -> Tensor:
        return pixel_shuffle(latents, 2) if packs else latents

    torch.testing.assert_close(measured, unpack(clean), rtol=1e-5, atol=1e-5)
    noised = arch.objective.at_timestep(500).corrupt(clean, torch.Generator().manual_seed(2))
    own = arch.text.encode(models.text_encoders, arch.text.tokenize([CAPTION]))
    named = {"latents_BCHW", "clean_BCHW", "noise_BCHW"}
    same = replace(noised, **{name: unpack(getattr(noised, name)) for name in named})
    target, sigma = arch.objective.target(noised), float(noised.sigmas_B)
    sign = -1.0 if torch.equal(target, clean - noised.noise_BCHW) else 1.0

    def estimate() -> Tensor:
        made = arch.objective.estimate(arch.predict(models.denoiser, noised, own, BATCH), noised).float()
        return (noised.latents_BCHW - made) / sigma if predicts_image else made

    # SD3's own script measures the error of the image, which weights the loss by the square of sigma.
    if predicts_image := torch.equal(target, clean):
        target = noised.noise_BCHW - clean
    theirs = getattr(family.pipe, convention.denoiser)
    expected_loss, expected = loss_and_gradients(models.denoiser, estimate, target)
    loss, actual = loss_and_gradients(theirs, lambda: sign * predict(theirs, same, conditioning, BATCH), unpack(target))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    converted, least = family.convert(expected), 1e-2 * float(max(gradient.norm() for gradient in actual.values()))
    assert len(actual) > 20
    for path, gradient in actual.items():
        error = (gradient - converted[path].reshape(gradient.shape)).norm() / gradient.norm().clamp(min=least)
        assert error < 1e-5, (path, error)


def loss_and_gradients(
    denoiser: nn.Module, estimate: Callable[[], Tensor], target: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """Return the loss, and the gradients of the layers that adapters change, by path."""
    layers = {
        f"{path}.weight": m.weight for path, m in denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
    }
    denoiser.requires_grad_(True)
    loss = mse_loss(estimate(), target)
    found = torch.autograd.grad(loss, list(layers.values()), allow_unused=True)
    return loss.item(), {path: g for path, g in zip(layers, found, strict=True) if g is not None}
