"""The convention of tiny pipelines is measured, passes the check, and wrong conventions fail it."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from library.architectures.any_pipeline import conditioning
from library.architectures.any_pipeline.check import check, gives_same_in_batch, require_exact
from library.architectures.any_pipeline.conditioning import capture_text
from library.architectures.any_pipeline.convention import PROMPTS, Convention, Line
from library.architectures.any_pipeline.maps import SizeMaps
from library.architectures.any_pipeline.measuring import measure
from library.architectures.any_pipeline.watch import Refused, Watched
from tests.tiers import first_is_fast
from tests.tiny.pipelines import PIPELINES, build_tiny_pipeline, watch_pipeline
from tests.tolerances import FLOAT32_SAME_MATH

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
