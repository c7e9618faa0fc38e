"""The measured convention of tiny pipelines: wrong ones fail its check; gradients and files follow it."""

import importlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, pixel_shuffle

from library.architectures.any_pipeline import conditioning
from library.architectures.any_pipeline.assembly import read_latent_spec
from library.architectures.any_pipeline.check import check, gives_same_in_batch, require_exact
from library.architectures.any_pipeline.conditioning import CapturedText, capture_text
from library.architectures.any_pipeline.convention import PROMPTS, Convention, Line
from library.architectures.any_pipeline.folder import open_folder
from library.architectures.any_pipeline.maps import SizeMaps
from library.architectures.any_pipeline.measuring import measure
from library.architectures.any_pipeline.targets import with_targets
from library.architectures.any_pipeline.training import PipelineLatents, PipelinePredict
from library.architectures.any_pipeline.trees import join_values, leaves, move
from library.architectures.any_pipeline.watch import Answers, Refused, Trace, Watched
from library.base.errors import UserError
from library.checkpoints.files import load_state_dict
from library.commands.base_models import open_base_model
from library.types import Batch, Conditioning, Noised
from networks import dylora, loha, lora
from tests.tiers import first_is_fast
from tests.tiny.pipelines import PIPELINES, build_tiny_pipeline, watch_pipeline
from tests.tolerances import FLOAT32_DEEP, FLOAT32_SAME_MATH, FLOAT32_SAMPLED, SUMS_OF_A_PASS
from tools import extract_lora_from_dylora, extract_lora_from_models, merge_lora

SIZE = (64, 64)


@cache
def measured(name: str) -> tuple[Watched, Convention, SizeMaps]:
    watched = watch_pipeline(build_tiny_pipeline(name))
    return watched, *measure(watched, SIZE)


@pytest.mark.parametrize("name", first_is_fast(sorted(PIPELINES)))
def test_the_measured_convention_is_what_the_pipeline_does(name: str) -> None:
    watched, convention, maps = measured(name)
    require_exact(check(watched, convention, maps))


def negate(convention: Convention, maps: SizeMaps) -> tuple[Convention, SizeMaps]:
    return convention, replace(maps, out=replace(maps.out, scale_M=-maps.out.scale_M))


def tell(line: Line) -> Callable[[Convention, SizeMaps], tuple[Convention, SizeMaps]]:
    return lambda convention, maps: (replace(convention, lines=dict.fromkeys(convention.time, line)), maps)


def scale_latents(convention: Convention, maps: SizeMaps) -> tuple[Convention, SizeMaps]:
    return convention, replace(maps, decode=replace(maps.decode, scale_M=1.1 * maps.decode.scale_M))


def forget_shift(convention: Convention, maps: SizeMaps) -> tuple[Convention, SizeMaps]:
    return convention, replace(maps, decode=replace(maps.decode, offset_M=torch.zeros_like(maps.decode.offset_M)))


def reverse_packing(convention: Convention, maps: SizeMaps) -> tuple[Convention, SizeMaps]:
    return convention, replace(maps, decode=replace(maps.decode, index_M=maps.decode.index_M.flip(0)))


def turn_target(convention: Convention, maps: SizeMaps) -> tuple[Convention, SizeMaps]:
    return replace(convention, target="latent - noise"), maps


def forget_pooled_text(convention: Convention, maps: SizeMaps) -> tuple[Convention, SizeMaps]:
    return replace(convention, text=tuple(path for path in convention.text if path != ("pooled_projections",))), maps


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (negate, "prediction"),
        (tell(Line(-1.0, 1.0)), "prediction"),
        (tell(Line(1000.0, 0.0)), "prediction"),
        (scale_latents, "latents"),
        (forget_shift, "latents"),
        (reverse_packing, "latents"),
        (turn_target, "step"),
        (forget_pooled_text, "own mix"),
    ],
)
def test_a_wrong_convention_fails_the_check(
    change: Callable[[Convention, SizeMaps], tuple[Convention, SizeMaps]], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, convention, maps = measured("FluxPipeline")
    monkeypatch.setattr(conditioning, "require_fixed", lambda *_: None)
    with pytest.raises(Refused, match=f"what was measured differs from what the pipeline does, in .*{error}"):
        require_exact(check(watched, *change(convention, maps)))


def test_a_caption_that_changes_a_constant_is_refused() -> None:
    watched, convention, maps = measured("FluxPipeline")
    capture_text(watched, convention, "a third caption")
    forgetful, _ = forget_pooled_text(convention, maps)
    with pytest.raises(Refused, match="the caption 'a third caption' changes pooled_projections of the denoiser"):
        capture_text(watched, forgetful, "a third caption")


@pytest.mark.parametrize(
    ("name", "pads"), [("LuminaPipeline", True), ("ErnieImagePipeline", True), ("QwenImagePipeline", False)]
)
def test_captions_of_two_lengths_share_a_call_where_a_mask_makes_that_the_same(name: str, pads: bool) -> None:
    watched, convention, maps = measured(name)
    assert gives_same_in_batch(watched, convention, maps)
    assert gives_same_in_batch(watched, convention, maps, PROMPTS) == pads
    lengths = {sum(map(torch.numel, capture_text(watched, convention, text).values())) for text in PROMPTS}
    assert len(lengths) == 2


@pytest.mark.parametrize("name", ["ZImagePipeline", "StableDiffusionXLPipeline"])
def test_samples_in_lists_and_single_timesteps_share_a_call(name: str) -> None:
    assert gives_same_in_batch(*measured(name))


def test_a_dropped_caption_is_the_negative_prompt_of_the_pipeline() -> None:
    watched, convention, _ = measured("StableDiffusionPipeline")
    pipe = build_tiny_pipeline("StableDiffusionPipeline")
    _, negative = pipe.encode_prompt("a cat", "cpu", 1, True)
    dropped, named = (capture_text(watched, convention, text) for text in ("", "a dog"))
    states = ("encoder_hidden_states",)
    torch.testing.assert_close(dropped[states], negative, **FLOAT32_SAME_MATH)
    torch.testing.assert_close(named[states], pipe.encode_prompt("a dog", "cpu", 1, False)[0], **FLOAT32_SAME_MATH)


def test_a_dropped_caption_of_sdxl_is_zeros() -> None:
    watched, convention, _ = measured("StableDiffusionXLPipeline")
    for text, is_zero in (("", True), ("a dog", False)):
        captured = capture_text(watched, convention, text)
        assert bool(captured["encoder_hidden_states",].any()) != is_zero


def test_hooks_that_a_pipeline_puts_on_its_models_act_once() -> None:
    """A hook on a part changes what the model computes; one on the whole model is called once for each of its calls."""
    watched = watch_pipeline(build_tiny_pipeline("AuraFlowPipeline"))
    hooked: list[nn.Module] = []
    norm = watched.pipe.text_encoder.encoder.final_layer_norm
    norm.register_forward_hook(lambda module, args, output: torch.zeros_like(args[0]))
    watched.pipe.text_encoder.register_forward_hook(lambda module, *_: hooked.append(module))
    encoded = [call for call in watched.draw("a cat", SIZE).calls if call.name == "text_encoder"]
    assert len(hooked) == len(encoded)
    for call in encoded:
        assert not call.output["last_hidden_state"].any()


# Gradients of an adapter against a float64 step on the arguments with which the pipeline itself calls its denoiser.


@pytest.mark.parametrize("name", first_is_fast(sorted(PIPELINES)))
def test_the_gradient_is_that_of_the_pipelines_own_call_in_float64(name: str) -> None:
    compare_with_float64(lambda: build_tiny_pipeline(name), *measured(name))


def compare_with_float64(
    build: Callable[[], Any], watched: Watched, c: Convention, maps: SizeMaps, steps: int = 3
) -> None:
    """Compare loss and gradients of an adapter at the middle of `steps` steps. `build` gives the pipeline anew."""
    middle = steps // 2
    clean, noise = torch.randn(2, *maps.sample_shape, generator=torch.Generator().manual_seed(4))

    def draw(samples: Any = None) -> Trace:
        return watched.draw(CAPTION, SIZE, Answers(samples=samples), steps=steps, **c.extra)

    trace = draw()
    level, (signal, share) = mix_of(c, trace, watched.own_scheduler, middle)
    own = draw(lambda old: signal * clean + share * noise)
    theirs, adapter = adapted(build(), c.denoiser)
    for layer in theirs.modules():  # Kandinsky 5 computes times in float32, whatever its type
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda layer, given: tuple(x.to(layer.weight.dtype) for x in given))
    output = theirs.double()(**move(own.calls[middle].kwargs, torch.device("cpu"), torch.float64))
    prediction = maps.out(join_values(output)[None]).reshape(clean.shape)
    expected_loss, expected = backward(prediction, target_of(c, clean, noise, signal, share), adapter)

    predict, _, conditioning = parts_of(watched, c, maps)
    raw = [draw(lambda old, sample=sample: sample).decoded[0] for sample in (clean, noise)]
    clean, noise = (c.latents_of(r.reshape(1, c.latent_shape[1], *r.shape[-2:])) for r in raw)
    noised = Noised(signal * clean + share * noise, clean, noise, torch.tensor([level]), torch.tensor([level]))
    ours, adapter = adapted(build(), c.denoiser)
    prediction = predict(ours, noised, conditioning, BATCH)
    loss, actual = backward(prediction, target_of(c, clean, noise, signal, share), adapter)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert (actual - expected).norm() < SUMS_OF_A_PASS * expected.norm() and expected.norm() > 0


def adapted(pipe: Any, component: str) -> tuple[Any, Any]:
    """Return a fresh denoiser, and the adapter attached to it."""
    denoiser = getattr(pipe, component)
    return denoiser, attach_adapter(denoiser, component)


def backward(prediction: Tensor, target: Tensor, adapter: Any) -> tuple[float, Tensor]:
    loss = mse_loss(prediction, target.to(prediction))
    gradients = torch.autograd.grad(loss, list(adapter.parameters()), materialize_grads=True)
    return loss.item(), torch.cat([gradient.flatten().double() for gradient in gradients])


def mix_of(convention: Convention, trace: Trace, own: Any, step: int) -> tuple[float, tuple[float, float]]:
    """Return the noise level of a step, and the weights of image and noise there, by the pipeline's own scheduler."""
    if convention.mix == "flow":
        sigma = float(trace.scheduler.sigmas[step])
        level = 1 - sigma if own.config.get("invert_sigmas") else sigma
        return level, (1 - level, level)
    level = int(trace.steps[step].timestep)
    abar = float(own.alphas_cumprod[level])
    return level, (math.sqrt(abar), math.sqrt(1 - abar))


def target_of(convention: Convention, clean: Tensor, noise: Tensor, signal: float, share: float) -> Tensor:
    velocity = signal * noise - share * clean
    known = {"noise - latent": noise - clean, "latent - noise": clean - noise, "noise": noise, "velocity": velocity}
    return known[convention.target]


# Adapter files are loaded by the pipeline's own load_lora_weights where it has one, else through PEFT.


def attach_adapter(denoiser: Any, component: str, kind: Any = lora) -> Any:
    """Attach a random adapter to a denoiser, and return the network."""
    with_targets(denoiser, component)
    network: Any = kind.create_network(1.0, 4, 2, None, [], denoiser)
    network.apply_to([], denoiser, False, True)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def save_adapter(pipe: Any, component: str, path: Path, kind: Any = lora) -> None:
    """Attach a random adapter and save it."""
    network = attach_adapter(getattr(pipe, component), component, kind)
    network.save_weights(str(path), None, {"ss_base_model_version": "any_pipeline"})


def predict(pipe: Any, component: str, kwargs: Any) -> Tensor:
    with torch.no_grad():
        return join_values(getattr(pipe, component)(**kwargs))


def load_into(pipe: Any, component: str, path: Path) -> None:
    """Load a file as the docs say."""
    has_own = getattr(getattr(pipe, component), "load_lora_adapter", None) is not None
    if has_own and component in getattr(pipe, "_lora_loadable_modules", ()):
        pipe.load_lora_weights(str(path))
        return
    denoiser, state = getattr(pipe, component), load_state_dict(path)
    if has_own:
        denoiser.load_lora_adapter(state, prefix=component)
        return
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    layers = {key.removeprefix(f"{component}."): tensor for key, tensor in state.items()}
    paths = [key.removesuffix(".lora_A.weight") for key in layers if key.endswith(".lora_A.weight")]
    rank = len(next(tensor for key, tensor in layers.items() if key.endswith(".lora_A.weight")))
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=paths), denoiser)
    set_peft_model_state_dict(denoiser, layers)


@pytest.mark.parametrize("name", first_is_fast(sorted(PIPELINES)))
def test_the_saved_file_gives_the_trained_prediction(name: str, tmp_path: Path) -> None:
    _, convention, maps = measured(name)
    pipe, path, component = build_tiny_pipeline(name), tmp_path / "a.safetensors", convention.denoiser
    before = predict(pipe, component, maps.kwargs)
    save_adapter(pipe, component, path)
    trained = predict(pipe, component, maps.kwargs)
    assert all(key.startswith(f"{component}.") for key in load_state_dict(path))
    assert any(key.endswith(".lora_A.weight") for key in load_state_dict(path))
    fresh = build_tiny_pipeline(name)
    load_into(fresh, component, path)
    torch.testing.assert_close(predict(fresh, component, maps.kwargs), trained, **FLOAT32_SAME_MATH)
    assert (trained - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", first_is_fast(sorted(PIPELINES)))
def test_an_adapter_is_merged_into_a_folder_and_extracted_again(name: str, tmp_path: Path) -> None:
    _, convention, maps = measured(name)
    component, kwargs = convention.denoiser, maps.kwargs
    pipe, base, merged = build_tiny_pipeline(name), tmp_path / "base", tmp_path / "merged"
    pipe.save_pretrained(base)
    save_adapter(pipe, component, tmp_path / "a.safetensors")
    trained = predict(pipe, component, kwargs)
    merge = ["--sd_model", base, "--models", tmp_path / "a.safetensors", "--save_to", merged]
    assert merge_lora.main([str(word) for word in merge]) == 0
    of_merged = type(pipe).from_pretrained(merged)
    torch.testing.assert_close(predict(of_merged, component, kwargs), trained, **FLOAT32_DEEP)
    extract = ["--model_org", base, "--model_tuned", merged, "--save_to", tmp_path / "b.safetensors", "--dim", "4"]
    assert extract_lora_from_models.main([str(word) for word in extract]) == 0
    fresh = build_tiny_pipeline(name)
    load_into(fresh, component, tmp_path / "b.safetensors")
    torch.testing.assert_close(predict(fresh, component, kwargs), trained, **FLOAT32_SAMPLED)


def test_adapters_of_a_pipeline_become_one(tmp_path: Path) -> None:
    name = "AuraFlowPipeline"
    _, convention, maps = measured(name)
    pipe, component = build_tiny_pipeline(name), convention.denoiser
    for number, kind in enumerate((loha, lora)):
        save_adapter(pipe, component, tmp_path / f"{number}.safetensors", kind)
    trained = predict(pipe, component, maps.kwargs)
    files = [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]
    assert (
        merge_lora.main(["--models", *map(str, files), "--concat", "--save_to", str(tmp_path / "both.safetensors")])
        == 0
    )
    fresh = build_tiny_pipeline(name)
    load_into(fresh, component, tmp_path / "both.safetensors")
    torch.testing.assert_close(predict(fresh, component, maps.kwargs), trained, **FLOAT32_SAME_MATH)


def test_a_dylora_of_a_pipeline_is_cut(tmp_path: Path) -> None:
    name = "AuraFlowPipeline"
    _, convention, maps = measured(name)
    component, base = convention.denoiser, predict(build_tiny_pipeline(name), convention.denoiser, maps.kwargs)
    save_adapter(build_tiny_pipeline(name), component, tmp_path / "a.safetensors", dylora)
    cut = ["--model", tmp_path / "a.safetensors", "--save_to", tmp_path / "cut.safetensors", "--unit", "2"]
    assert extract_lora_from_dylora.main([str(word) for word in cut]) == 0
    whole, half = (load_state_dict(tmp_path / f"{stem}.safetensors") for stem in ("cut-0004", "cut-0002"))
    assert whole.keys() == half.keys() and all(key.startswith(f"{component}.") for key in half)
    fresh = build_tiny_pipeline(name)
    load_into(fresh, component, tmp_path / "cut-0002.safetensors")
    assert (predict(fresh, component, maps.kwargs) - base).abs().max() > 1e-3


def test_a_folder_that_is_not_trained_is_merged_into_and_its_errors_name_the_option(tmp_path: Path) -> None:
    build_tiny_pipeline("AuraFlowPipeline").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "LCMScheduler"]}))
    with pytest.raises(UserError, match="distilled to a few steps"):
        open_folder(str(tmp_path), trusts_code=False)
    assert len(open_base_model("--sd_model", tmp_path).files[0].modules) == 70
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^--sd_model: .*transformer has no weights"):
        open_base_model("--sd_model", tmp_path)


# The measured pipeline gives the loss of the families that are written by hand, on the same weights.

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
        tests = parity(f"test_{name}")
        return Family(tests.run_of(folder), tests.pipeline_of(folder, *more), convert=split_layers(name))

    return build


def split_layers(name: str) -> Callable[[dict[str, Tensor]], Mapping[str, Tensor]]:
    """Return the function that renames and splits tensors of the denoiser as diffusers has them."""
    convert = getattr(reference(name), "diffusers_state", lambda state, config: state)
    return lambda state: convert(state, tiny(name).CONFIG)  # type: ignore[no-any-return]


def flux(folder: Path) -> Family:
    tests = parity("test_flux1")
    words = tiny("flux").build_tiny_flux(folder, 9, "diffusers", True)
    options = {"max_sequence_length": tests.NUM_TOKENS}
    run = tests.run_of([*words, "--guidance_scale", "1.0"])
    return Family(run, tests.pipeline_of(folder, True), options, split_layers("flux"))


def lumina(folder: Path) -> Family:
    tests = parity("test_lumina")
    words = tiny("lumina").build_tiny_lumina(folder, 9, "diffusers")
    options = {"max_sequence_length": tests.NUM_TOKENS, "system_prompt": tests.SYSTEM}
    return Family(tests.run_of(words), tests.pipeline_of(folder), options, split_layers("lumina"))


def sd3(folder: Path) -> Family:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    from library.architectures.sd3.assembly import build

    tests = parity("test_sd3")
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

    tests = parity("test_hunyuan_image")
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
    arch = parity("test_sd").open_sdxl(file, True)
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
