"""Pipelines with their publishers' schedulers, whose timesteps are whole numbers, train as a step in float64 does."""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from library.architectures.any_pipeline.check import check, require_exact
from library.architectures.any_pipeline.convention import Convention, Line, Table, level_error
from library.architectures.any_pipeline.folder import list_arguments
from library.architectures.any_pipeline.maps import NUM_TABLE_STEPS, SizeMaps, read_level_values
from library.architectures.any_pipeline.measuring import fit_line, fit_whole_line, measure
from library.architectures.any_pipeline.refusals import find_cause
from library.architectures.any_pipeline.watch import Refused, Watched
from library.types import Noised
from tests.any_pipeline.published import MODELS, UNKNOWN, Published, build_published
from tests.any_pipeline.test_convention import (
    BATCH,
    CAPTION,
    HEIGHT,
    WIDTH,
    compare_with_float64,
    loss_and_gradients,
    parts_of,
)
from tests.any_pipeline.test_refusals import TRAINED, list_pipelines
from tests.tiers import first_is_fast
from tests.tiny.more_pipelines import MORE
from tests.tiny.pipelines import PIPELINES, watch_pipeline

SIZE = (64, 64)


TARGETS = {"epsilon": "noise", "v_prediction": "velocity", "flow_prediction": "noise - latent"}
CASES = [
    (name, model.name) for model in MODELS if model.scheduler != UNKNOWN and not model.refused
    for name in model.pipelines
]  # fmt: skip


@cache
def published(name: str, model: str = "") -> tuple[Any, Watched, Convention, SizeMaps]:
    """Measure a pipeline with the scheduler of a published model, the first one without a name."""
    pipe = build_published(next(m for m in MODELS if name in m.pipelines and model in m.name), name)
    watched = watch_pipeline(pipe)
    return pipe, watched, *measure(watched, SIZE)


@pytest.mark.parametrize(("name", "model"), first_is_fast(CASES))
def test_a_published_scheduler_is_trained_as_a_step_in_float64(name: str, model: str) -> None:
    pipe, watched, convention, maps = published(name, model)
    require_exact(check(watched, convention, maps))
    own, scheduler = pipe.scheduler, watched.pipe.scheduler
    if convention.mix == "ddpm":
        torch.testing.assert_close(scheduler.alphas_cumprod, own.alphas_cumprod, rtol=0, atol=0)
    target = TARGETS[own.config.get("prediction_type", "flow_prediction")]
    assert convention.target == ("latent - noise" if own.config.get("invert_sigmas") else target)
    # UNetMotionModel takes over some weights and draws the others, so a second one is another model.
    compare_with_float64(lambda: copy.deepcopy(pipe), watched, convention, maps, steps=5)


def test_every_class_that_is_trained_has_a_published_scheduler_or_none_was_found() -> None:
    known = {name: model for model in MODELS for name in model.pipelines if not model.refused}
    assert known.keys() == {*PIPELINES, *MORE, *TRAINED}
    assert all(model.source for model in MODELS)
    assert sum(model.scheduler != UNKNOWN for model in known.values()) >= 52


@pytest.mark.parametrize("model", [model for model in MODELS if model.refused], ids=lambda model: model.name)
def test_other_published_schedulers_are_refused_by_name(model: Published) -> None:
    for name in model.pipelines:
        kind = list_pipelines()[name]
        cause = find_cause(kind, tuple(list_arguments(kind)), model.scheduler, model.config)
        assert cause is not None and cause.startswith(model.refused)


def wan_step(pipe: Any, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Return normalized latents and the text arguments as the publisher's code gives them, float64."""
    config, shape = pipe.vae.config, (1, -1, 1, 1, 1)
    mean, deviation = (torch.tensor(values, dtype=torch.float64).view(shape) for values in (
        config.latents_mean, config.latents_std))  # fmt: skip
    raw = copy.deepcopy(pipe.vae).double().encode(pixels.unsqueeze(2)).latent_dist.mode()
    states, _ = pipe.encode_prompt(CAPTION, do_classifier_free_guidance=False, max_sequence_length=512)
    return (raw - mean) / deviation, {"encoder_hidden_states": states.double()}


def sana_step(pipe: Any, pixels: Tensor) -> tuple[Tensor, dict[str, Any]]:
    default = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    states, mask, _, _ = pipe.encode_prompt(CAPTION, False, complex_human_instruction=default)
    raw = copy.deepcopy(pipe.vae).double().encode(pixels).latent
    text = {"encoder_hidden_states": states.double(), "encoder_attention_mask": mask}
    return raw * pipe.vae.config.scaling_factor, text


STEPS: Mapping[str, Callable[[Any, Tensor], tuple[Tensor, dict[str, Any]]]] = {
    "WanPipeline": wan_step,
    "SanaPipeline": sana_step,
    "SkyReelsV2Pipeline": wan_step,
}


@pytest.mark.parametrize("name", sorted(STEPS))
@pytest.mark.parametrize("sigma", [0.7771, 0.3339])
def test_loss_and_gradients_are_those_of_a_step_in_float64(name: str, sigma: float) -> None:
    pipe, watched, convention, maps = published(name)
    predict, codec, conditioning = parts_of(watched, convention, maps)
    pixels = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents, text = STEPS[name](pipe, pixels.double())
    measured = codec.normalize(codec.encode(watched.models[watched.vae], pixels, None))
    torch.testing.assert_close(measured.double(), latents.reshape(measured.shape), rtol=1e-5, atol=1e-5)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    # What a training script does: mix at sigma, and tell the model the timestep that the scheduler keeps.
    mixed, timestep = (1 - sigma) * latents + sigma * noise, torch.tensor([int(1000 * sigma)])
    model = copy.deepcopy(pipe.transformer).double().eval()
    scale = getattr(model.config, "timestep_scale", 1.0)
    expected_loss, expected = loss_and_gradients(
        model, lambda: model(hidden_states=mixed, timestep=timestep * scale, **text).sample, noise - latents
    )
    flat = [values.float().reshape(measured.shape) for values in (mixed, latents, noise)]
    noised = Noised(*flat, torch.tensor([sigma]), torch.tensor([1000 * sigma]))
    target = flat[2] - flat[1]
    theirs = pipe.transformer
    loss, actual = loss_and_gradients(theirs, lambda: predict(theirs, noised, conditioning, BATCH), target)
    theirs.requires_grad_(False)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert actual.keys() == expected.keys() and len(actual) > 20
    joined = [torch.cat([found[path].double().flatten() for path in expected]) for found in (actual, expected)]
    assert (joined[0] - joined[1]).norm() / joined[1].norm() < 1e-5


@pytest.mark.parametrize("name", sorted(STEPS))
def test_timesteps_of_published_schedulers_are_cut(name: str) -> None:
    assert published(name)[2].lines == {("timestep",): Line(1000.0, 0.0, "cut")}


def test_a_table_that_is_exact_at_its_own_levels_alone_fails_the_check() -> None:
    _, watched, convention, maps = published("WanPipeline")
    levels, given = read_level_values(watched, convention, SIZE, maps.template, NUM_TABLE_STEPS)
    table = Table(tuple(levels), tuple(given["timestep",]))
    assert level_error(table, levels, given["timestep",]) == 0
    tabled = replace(convention, lines={}), replace(maps, tables={("timestep",): table})
    with pytest.raises(Refused, match="levels"):
        require_exact(check(watched, *tabled))


def test_a_table_of_whole_values_gives_whole_values() -> None:
    levels_B = torch.tensor([0.1, 0.17, 0.32])
    assert Table((0.1, 0.2, 0.4), (100, 200, 401)).at(levels_B).tolist() == [100.0, 170.0, 321.0]
    torch.testing.assert_close(Table((0.1, 0.3), (1.5, 2.5)).at(levels_B[1:2]), torch.tensor([1.85]))


def test_lines_of_whole_values_are_told_apart() -> None:
    levels = torch.linspace(0.003, 0.98, 100, dtype=torch.float64)
    cut, rounded = (1000 * levels).floor().tolist(), (1000 * levels).round().tolist()
    assert fit_line(levels.tolist(), cut) is None
    assert fit_whole_line(levels.tolist(), cut) == Line(1000.0, 0.0, "cut")
    assert fit_whole_line(levels.tolist(), rounded) == Line(1000.0, 0.0, "rounded")
    assert fit_whole_line(levels.tolist(), (1000 * levels.sqrt()).floor().tolist()) is None
    assert Line(1000.0, 0.0, "cut").describe("sigma") == "1000 sigma, cut to whole numbers"
