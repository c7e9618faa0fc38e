"""Wan 2.2 A14B: one of two denoisers is trained at its own noise levels, and both files draw and are merged."""

import argparse
import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import mse_loss

from library.architectures.any_pipeline.assembly import measure_folder
from library.architectures.any_pipeline.check import check, require_exact
from library.architectures.any_pipeline.convention import Convention
from library.architectures.any_pipeline.experts import COMPONENTS, Expert
from library.architectures.any_pipeline.folder import open_folder
from library.architectures.any_pipeline.maps import SizeMaps
from library.architectures.any_pipeline.measuring import measure
from library.architectures.any_pipeline.options import PipelineOptions
from library.architectures.any_pipeline.training import build_objective
from library.architectures.any_pipeline.trees import move
from library.architectures.any_pipeline.watch import Watched
from library.base.errors import UserError
from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import read_metadata
from library.diffusion.timesteps import LevelDraws
from library.options.training.noise import NoiseOptions
from library.types import Noised
from tests.any_pipeline.published import MODELS
from tests.any_pipeline.test_convention import BATCH, CAPTION, SIZE, attach_adapter, parts_of
from tests.any_pipeline.test_training import SCRIPT, Train, arguments
from tests.tiny.language_model_pipelines import wan_2_2
from tests.tiny.pipelines import build_tiny_pipeline, watch_pipeline
from tests.tolerances import FLOAT32_DEEP, SUMS_OF_A_PASS
from tools import draw, merge_lora

BOUNDARY = 0.875  # of Wan-AI/Wan2.2-T2V-A14B-Diffusers, as others quote its model_index.json
EXPERTS = sorted(COMPONENTS)
PROMPT = "a red bird"


def build() -> Any:
    """Build a pipeline of two denoisers with the published scheduler and boundary."""
    scheduler = next(model for model in MODELS if "WanPipeline" in model.pipelines).build_scheduler()
    parts = {**wan_2_2(), "scheduler": scheduler, "boundary_ratio": BOUNDARY}
    return build_tiny_pipeline("WanPipeline of two transformers", builder=lambda: parts)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "wan 2.2"
    build().save_pretrained(folder)
    return folder


def options_with(**values: Any) -> PipelineOptions:
    return PipelineOptions.from_args(argparse.Namespace(**{**PipelineOptions.defaults(), **values}))


@cache
def measured(expert: str) -> tuple[Watched, Convention, SizeMaps]:
    """Measure one denoiser, which is told to draw at all levels as `open_folder` tells it."""
    pipe = build()
    pipe.register_to_config(boundary_ratio={"high": 0.0, "low": 2.0}[expert])
    watched = watch_pipeline(pipe)
    del watched.models[Expert(expert, BOUNDARY).resting]
    return watched, *measure(watched, SIZE)


@pytest.mark.parametrize("expert", EXPERTS)
def test_the_gradient_of_an_expert_is_that_of_the_whole_pipeline_in_float64(expert: str) -> None:
    """The pipeline draws with both; the step is one at which it calls this denoiser."""
    watched, c, maps = measured(expert)
    require_exact(check(watched, c, maps))
    assert c.denoiser == COMPONENTS[expert]
    pipe, calls, steps = build(), list[dict[str, Any]](), list[torch.Tensor]()
    own_step = pipe.scheduler.step

    def step(output: torch.Tensor, timestep: Any, sample: torch.Tensor, **more: Any) -> Any:
        steps.append(sample.clone())
        return own_step(output, timestep, sample, **more)

    pipe.scheduler.step = step
    for name in COMPONENTS.values():
        getattr(pipe, name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: calls.append({"name": name, **kwargs}), with_kwargs=True
        )
    pipe(CAPTION, height=64, width=64, num_frames=1, num_inference_steps=6, guidance_scale=1.0, output_type="latent")
    sigmas = pipe.scheduler.sigmas
    assert [call["name"] for call in calls] == [COMPONENTS["high" if s >= BOUNDARY else "low"] for s in sigmas[:-1]]
    place = next(i for i, call in enumerate(calls) if call["name"] == c.denoiser)
    kwargs = {name: value for name, value in calls[place].items() if name != "name"}
    noise = torch.randn(steps[place].shape, generator=torch.Generator().manual_seed(3))

    model = copy.deepcopy(getattr(build(), c.denoiser)).double()
    adapter = attach_adapter(model, "transformer")
    output = model(**move(kwargs, torch.device("cpu"), torch.float64))[0]
    expected = torch.autograd.grad(mse_loss(output, noise.double()), list(adapter.parameters()), materialize_grads=True)

    predict, _, conditioning = parts_of(watched, c, maps)
    ours = copy.deepcopy(getattr(build(), c.denoiser))
    adapter = attach_adapter(ours, "transformer")
    latents, level = steps[place].reshape(1, *c.latent_shape[1:2], *steps[place].shape[-2:]), sigmas[place : place + 1]
    prediction = predict(ours, Noised(latents, latents, latents, level, level), conditioning, BATCH)
    loss = mse_loss(prediction, noise.reshape(prediction.shape))
    actual = torch.autograd.grad(loss, list(adapter.parameters()), materialize_grads=True)
    one, two = (torch.cat([g.flatten().double() for g in gradients]) for gradients in (actual, expected))
    assert loss.item() == pytest.approx(mse_loss(output, noise.double()).item(), rel=1e-5)
    assert (one - two).norm() < SUMS_OF_A_PASS * two.norm() and two.norm() > 0


@pytest.mark.parametrize("expert", EXPERTS)
def test_levels_are_those_of_the_whole_model_cut_off_at_the_boundary(expert: str) -> None:
    watched, convention, maps = measured(expert)
    predict, _, _ = parts_of(watched, convention, maps)
    draws = LevelDraws(20000, 8, 8, torch.Generator().manual_seed(1))
    of_all: Any = build_objective(options_with(), predict)
    own: Any = build_objective(options_with(), predict, Expert(expert, BOUNDARY))
    whole = of_all.draw_timesteps(draws)
    drawn = own.draw_timesteps(LevelDraws(20000, 8, 8, torch.Generator().manual_seed(2)))
    limit = 1000 * BOUNDARY
    inside = whole[whole >= limit] if expert == "high" else whole[whole < limit]
    assert drawn.min() >= limit if expert == "high" else drawn.max() <= limit
    for share in (0.1, 0.5, 0.9):
        assert float(drawn.quantile(share)) == pytest.approx(float(inside.quantile(share)), rel=0.03)


@pytest.mark.parametrize(
    ("expert", "wanted", "trained"),
    [
        ("high", (None, None), (875, 1000)),
        ("low", (None, None), (0, 875)),
        ("high", (900, None), (900, 1000)),
        ("low", (100, 950), (100, 875)),
        ("high", (900, 900), (900, 900)),
        ("high", (None, 500), None),
        ("low", (900, None), None),
        ("high", (None, 875), None),
        ("low", (875, None), None),
    ],
)
def test_a_range_of_timesteps_is_narrowed_or_refused(
    expert: str, wanted: tuple[int | None, int | None], trained: tuple[int, int] | None
) -> None:
    noise = NoiseOptions(min_timestep=wanted[0], max_timestep=wanted[1])
    if trained is None:
        with pytest.raises(UserError, match=f"--expert {expert} draws at the timesteps .*none lies between"):
            Expert(expert, BOUNDARY).narrow(noise)
        return
    narrowed = Expert(expert, BOUNDARY).narrow(noise)
    assert (narrowed.min_timestep, narrowed.max_timestep) == trained


def test_two_denoisers_need_an_expert_and_one_has_none(wan: Path, tmp_path: Path, train: Train) -> None:
    done = train(arguments(wan, tmp_path), script=SCRIPT)
    assert done.status == 1
    assert "--expert is required: WanPipeline has two denoisers, transformer for noise levels from 0.875" in done.stderr
    build_tiny_pipeline("AuraFlowPipeline").save_pretrained(tmp_path / "one")
    done = train(arguments(tmp_path / "one", tmp_path, "--expert", "low"), script=SCRIPT)
    assert done.status == 1 and "--expert low: AuraFlowPipeline has one denoiser; remove it" in done.stderr


def test_the_denoiser_that_rests_is_not_read(wan: Path) -> None:
    for expert in EXPERTS:
        folder = open_folder(str(wan), False, expert)
        watched = folder.build_stage()
        convention = measure_folder(folder, watched, "no")
        assert convention.denoiser == COMPONENTS[expert] and convention.idle == ()
        assert Expert(expert, BOUNDARY).resting not in folder.used
    one, two = (open_folder(str(wan), False, expert).fingerprint() for expert in EXPERTS)
    assert one != two


def adapter(folder: Path, wan: Path, train: Train, expert: str) -> Path:
    words = ["--expert", expert, "--output_name", expert, "--learning_rate", "1"]
    done = train(arguments(wan, folder, *words), script=SCRIPT).ok()
    second = " with load_into_transformer_2=True" if expert == "low" else ""
    assert f"the adapter is loaded by load_lora_weights of WanPipeline{second}\n" in done.stderr
    return folder / "out" / f"{expert}.safetensors"


@pytest.mark.slow
def test_both_files_are_loaded_drawn_with_and_merged(
    wan: Path, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {expert: adapter(tmp_path, wan, train, expert) for expert in EXPERTS}
    for expert, file in files.items():
        assert all(key.startswith("transformer.") for key in load_state_dict(file))
        entries = read_metadata(file)
        assert (entries["ss_expert"], entries["ss_boundary_ratio"]) == (expert, "0.875")
    images = {}
    for name, of_name in {"none": [], "high": ["high"], "low": ["low"], "both": EXPERTS}.items():
        pipe = build()
        for expert in of_name:
            pipe.load_lora_weights(str(files[expert]), load_into_transformer_2=expert == "low")
        images[name] = draw_with(pipe)
    differences = {name: np.abs(image - images["none"]).max() for name, image in images.items() if name != "none"}
    assert min(differences.values()) > 3 and np.abs(images["both"] - images["high"]).max() > 3

    prompt = f"{PROMPT} --w 64 --h 64 --s 8 --l 1 --d 11"
    words = [str(wan), "--prompt", prompt, "--no_half_vae"]
    both = ["--adapter", *(str(files[expert]) for expert in EXPERTS)]
    assert draw.main([*words, *both, "--output", str(tmp_path / "drawn")]) == 0
    (drawn,) = (tmp_path / "drawn").glob("*.png")
    pixels = np.asarray(Image.open(drawn).convert("RGB"), dtype=float)
    assert np.abs(pixels - images["both"]).max() <= 1.0  # rounding to whole values

    merged = tmp_path / "merged"
    words = ["--sd_model", str(wan), "--models", *(str(files[expert]) for expert in EXPERTS), "--save_to", str(merged)]
    assert merge_lora.main(words) == 0
    assert np.abs(draw_with(type(pipe).from_pretrained(merged)) - images["both"]).max() <= 1.0


def draw_with(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(11)
    drawing = {"num_frames": 1, "num_inference_steps": 8, "guidance_scale": 1.0, "generator": generator}
    return 255 * np.asarray(pipe(PROMPT, height=64, width=64, output_type="np", **drawing).frames[0])[0]


def write_adapter(path: Path, expert: str | None) -> Path:
    pipe = build()
    network = attach_adapter(getattr(pipe, COMPONENTS[expert or "high"]), "transformer")
    entries = {} if expert is None else {"ss_expert": expert, "ss_boundary_ratio": "0.875"}
    network.save_weights(str(path), None, {"ss_base_model_version": "any_pipeline", **entries})
    return path


def test_merged_adapters_change_the_denoiser_that_they_were_trained_on(wan: Path, tmp_path: Path) -> None:
    low = write_adapter(tmp_path / "low.safetensors", "low")
    assert merge_lora.main(["--sd_model", str(wan), "--models", str(low), "--save_to", str(tmp_path / "merged")]) == 0
    old, new = build(), type(build()).from_pretrained(tmp_path / "merged")
    assert same(old.transformer, new.transformer) and not same(old.transformer_2, new.transformer_2)
    changed = build()
    changed.load_lora_weights(str(low), load_into_transformer_2=True)
    changed.fuse_lora(components=["transformer_2"])
    for path, layer in new.transformer_2.named_modules():
        if isinstance(layer, nn.Linear):
            fused = changed.transformer_2.get_submodule(path)
            torch.testing.assert_close(layer.weight, getattr(fused, "base_layer", fused).weight, **FLOAT32_DEEP)


def same(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_file_that_does_not_say_its_denoiser_is_refused_and_two_do_not_become_one(
    wan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(write_adapter(tmp_path / f"{name}.safetensors", name)) for name in (None, "high", "low")]

    def save(name: str) -> list[str]:
        return ["--save_to", str(tmp_path / name)]

    assert merge_lora.main(["--sd_model", str(wan), "--models", files[0], *save("merged")]) == 1
    assert f"{files[0]} does not say on which of two denoisers it was trained" in capsys.readouterr().err
    assert merge_lora.main(["--models", *files[1:], "--concat", *save("one.safetensors")]) == 1
    assert "were trained on different denoisers (ss_expert high and low)" in capsys.readouterr().err
    assert merge_lora.main(["--models", files[2], files[2], "--concat", *save("two.safetensors")]) == 0
    assert read_metadata(tmp_path / "two.safetensors")["ss_expert"] == "low"
    drawing = [str(wan), "--prompt", PROMPT, "--adapter", files[0], "--output", str(tmp_path / "drawn")]
    assert draw.main(drawing) == 1
    assert "does not say on which of two denoisers it was trained" in capsys.readouterr().err
