"""Each rule that measures or checks is needed: without it the test that is named here fails.

`python -m pytest -m nightly tests/any_pipeline/test_mutations.py -k RULE` tries one.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from library.architectures.any_pipeline import (
    check,
    conditioning,
    convention,
    folder,
    maps,
    measuring,
    preview,
    start_check,
    watch,
)
from library.architectures.any_pipeline.training import PipelinePredict
from tests.any_pipeline import test_convention, test_every_start, test_more_pipelines, test_published_schedulers
from tests.any_pipeline.published import find_model
from tests.hiding import lazily

diffusers = lazily("diffusers")

pytestmark = pytest.mark.nightly
Change = tuple[Any, str, Any]  # (owner, name, what stands there instead)


def nothing(*_: Any, **__: Any) -> None:
    return None


def no_error(*_: Any, **__: Any) -> float:
    return 0.0


def published(name: str) -> Callable[[], None]:
    """Return the test of a pipeline with its published scheduler."""
    test = test_published_schedulers.test_a_published_scheduler_is_trained_as_a_step_in_float64
    return lambda: test(name, find_model(name).name)


def measured(name: str) -> Callable[[], None]:
    more = name in test_more_pipelines.MORE
    tests = test_more_pipelines if more else test_convention
    return lambda: tests.test_the_measured_convention_is_what_the_pipeline_does(name)


def wrong(name: str) -> Callable[[], None]:
    return lambda: test_every_start.test_a_wrong_convention_is_refused_at_every_start(name)


def later(name: str) -> Callable[[], None]:
    return lambda: test_every_start.test_what_was_measured_is_right_at_a_later_start_without_models(name)


def interpolate(table: Any, levels_B: Tensor) -> Tensor:
    """Look a level up without the rule that whole values stay whole."""
    pairs = torch.tensor(sorted(zip(table.levels, table.values, strict=True)))
    known, values = pairs.T.contiguous()
    after = torch.searchsorted(known, levels_B).clamp(1, len(known) - 1)
    return torch.lerp(
        values[after - 1], values[after], (levels_B - known[after - 1]) / known[after].sub(known[after - 1])
    )


def without_schedule(watched: Any, size: Any) -> Any:
    options = {name: option for name, option in watched.options.items() if not name.endswith("guidance_schedule")}
    with KEPT_SETTING(watched, options=options):
        return KEPT_QUIET(watched, size)


def setting_but(name: str) -> Callable[..., Any]:
    return lambda owner, **values: nullcontext() if name in values else KEPT_SETTING(owner, **values)


def plain_ddim(scheduler: Any) -> Any:
    return diffusers.DDIMScheduler.from_config(
        scheduler.config, clip_sample=False, set_alpha_to_one=True, timestep_spacing="leading", steps_offset=0
    )


KEPT_QUIET, KEPT_SETTING = measuring.find_quiet, watch.setting
RULES: Mapping[str, tuple[Callable[[], None], tuple[Change, ...]]] = {
    "whole timesteps": (
        lambda: test_published_schedulers.test_timesteps_of_published_schedulers_are_cut("WanPipeline"),
        ((measuring, "fit_whole_line", nothing),)),
    "cut timesteps": (
        lambda: test_published_schedulers.test_lines_of_whole_values_are_told_apart(),
        ((convention.Line, "at", lambda line, levels_B: (line.factor * levels_B + line.offset).round()),)),
    "steps that show cuts": (
        published("SkyReelsV2Pipeline"), ((maps, "NUM_TABLE_STEPS", 100), (measuring, "NUM_TABLE_STEPS", 100))),
    "steps off whole numbers": (
        published("SkyReelsV2Pipeline"), ((check, "NUM_STEPS", 3),)),
    "lines": (later("FluxPipeline"), ((measuring, "fit_line", lambda *_: convention.Line(1000.0, 0.0)),)),
    "tables keep whole values": (
        lambda: test_published_schedulers.test_a_table_of_whole_values_gives_whole_values(),
        ((convention.Table, "at", interpolate),)),
    "guidance schedules": (
        lambda: test_more_pipelines.test_a_second_denoiser_for_guidance_needs_no_weights_while_guidance_is_off(),
        ((measuring, "find_quiet", without_schedule),)),
    "tokenizers without a limit": (
        lambda: test_more_pipelines.test_a_tokenizer_without_a_limit_counts_captions_where_none_has_one(),
        ((test_more_pipelines, "find_tokenizer", lambda parts: parts["tokenizer"].model_max_length),)),
    "lists of sizes": (
        lambda: test_more_pipelines.test_a_pipeline_with_a_list_of_sizes_draws_any_size(),
        ((watch, "setting", setting_but("resolutions")),)),
    "default sizes": (measured("HiDreamImagePipeline"), ((watch, "setting", setting_but("default_sample_size")),)),
    "frames": (measured("SanaVideoPipeline"), ((watch, "NUM_FRAMES", ("num_frames", "video_length")),)),
    "num_frames": (measured("WanPipeline"), ((watch, "NUM_FRAMES", ("frames", "video_length")),)),
    "video_length": (published("AnimateDiffPipeline"), ((watch, "NUM_FRAMES", ()),)),
    "options that are switched off": (measured("SanaPipeline"), ((watch, "OFF", ()),)),
    "sigmas toward the image": (published("MochiPipeline"), (
        (convention, "levels_of", lambda scheduler: scheduler.sigmas),
        (start_check, "levels_of", lambda scheduler: scheduler.sigmas),
        (preview, "levels_of", lambda scheduler: scheduler.sigmas))),
    "noise levels of a scheduler that is replaced": (
        published("CogVideoXPipeline"), ((measuring, "plain_scheduler", plain_ddim),)),
    "a scheduler is replaced": (
        published("StableDiffusionXLPipeline"), ((measuring, "plain_scheduler", lambda scheduler: scheduler),)),
    "text before values for the image": (measured("ChromaPipeline"), ((measuring, "find_parts", nothing),)),
    "the negative prompt": (
        lambda: test_convention.test_a_dropped_caption_of_sdxl_is_zeros(),
        ((measuring, "find_unconditional", nothing),)),
    "scales by place in a patch": (
        later("ErnieImagePipeline"),
        ((measuring, "read_pattern", lambda decode: tuple(
            values.reshape(decode.shape[1], *decode.shape[-2:])[:, :1, :1]
            for values in (decode.scale_M, decode.offset_M))),)),
    "captions that share a call": (
        lambda: test_convention.test_captions_of_two_lengths_share_a_call_where_a_mask_makes_that_the_same(
            "QwenImagePipeline", False),
        ((test_convention, "gives_same_in_batch", lambda *_: True),)),
    "arguments that no caption changes": (
        lambda: test_convention.test_a_caption_that_changes_a_constant_is_refused(),
        ((conditioning, "require_fixed", nothing),)),
    "levels between those measured": (
        lambda: test_published_schedulers.test_a_table_that_is_exact_at_its_own_levels_alone_fails_the_check(),
        ((check, "compare_levels", no_error),)),
    "check of latents": (wrong("the codec alone scales"), ((start_check, "compare_codec", no_error),)),
    "check of the prediction": (wrong("output moved by a token"), ((start_check, "compare_prediction", no_error),)),
    "check of the objective": (wrong("objective of v"), ((start_check, "compare_objective", no_error),)),
    "check of a step": (wrong("target with the other sign"), (
        (start_check, "compare_step", no_error), (start_check, "compare_objective", no_error))),
    "check of the shift": (wrong("shift of levels times 3"), ((start_check, "compare_shift", no_error),)),
    "check of levels": (wrong("level of a table"), ((start_check, "compare_levels", no_error),)),
    "shift": (later("StableDiffusion3Pipeline"), ((PipelinePredict, "shift", lambda *_: 1.0),)),
}  # fmt: skip
"""Rule -> (a test that needs it, what to change so that the rule is gone)."""
CACHES = (
    test_convention.measured, test_more_pipelines.measured, test_published_schedulers.published,
    test_every_start.trained,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _measured_anew() -> Iterator[None]:
    """Measure in each test, and leave nothing that was measured without a rule."""
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


@pytest.mark.parametrize("rule", sorted(RULES))
def test_without_a_rule_its_test_fails(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test, changes = RULES[rule]
    for change in changes:
        monkeypatch.setattr(*change)
    with pytest.raises((Exception, pytest.fail.Exception)):
        test()


def test_an_encoder_s_sizes_are_looked_for(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "build_by_config", lambda kind, config: kind(config))
    with pytest.raises(Exception, match="cannot be opened"):
        test_more_pipelines.test_an_encoder_is_built_by_the_part_of_its_configuration_that_has_its_sizes(tmp_path)
