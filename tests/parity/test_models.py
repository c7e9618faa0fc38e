"""Our denoisers against those of diffusers with equal weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.architectures.flux.model import Flux
from library.architectures.sd3.model import MMDiT
from tests.parity.denoisers import assert_checkpointing_keeps_gradients
from tests.parity.test_preview import prompt_of
from tests.parity.tiny_models import open_run
from tests.tiny import chroma, sd3
from tests.tiny.base import Compared
from tests.tiny.bases import BASES
from tests.tolerances import FLOAT32_DEEP

COMPARED = {name: compared for base in BASES.values() for name, compared in base.compared.items()}
COMPILED = {name: base.deep for name, base in BASES.items() if base.deep is not None and base.is_flow}
COMPILED["chroma"] = replace(
    COMPILED["flux"],
    build=lambda: Flux(chroma.CONFIG),
    values=lambda: (*(value.detach() for value in chroma.inputs(8, 6)), None, torch.zeros(2)),
)
COMPILED["sd3 dual"] = replace(
    COMPILED["sd3"],
    build=lambda: MMDiT(sd3.DUAL),
    values=lambda: tuple(value.detach() for value in sd3.inputs(sd3.DUAL, (8, 6), seed=45).values()),
)


@pytest.mark.parametrize(
    ("compared", "case"),
    [
        pytest.param(compared, case, id=f"{name}, {case}")
        for name, compared in COMPARED.items()
        for case in compared.inputs
    ],
)
def test_outputs_and_input_gradients_match_diffusers(compared: Compared, case: str) -> None:
    ours = compared.model()
    theirs = compared.theirs(ours)
    results = []
    for run, model in ((compared.run, ours), (compared.run_theirs, theirs)):
        values = compared.inputs[case]()
        output = run(model, *values)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
        wanted = [value for value in values if value is not None and value.requires_grad]
        results.append((output, *torch.autograd.grad((output * weights).sum(), wanted)))
    for ours_value, theirs_value in zip(*results, strict=True):
        assert theirs_value.abs().max() > compared.least
        torch.testing.assert_close(ours_value, theirs_value, **FLOAT32_DEEP)


@pytest.mark.parametrize("name", COMPILED)
def test_gradient_checkpointing_does_not_change_gradients(name: str) -> None:
    deep = COMPILED[name]

    def values() -> list[torch.Tensor]:
        first, *others = deep.values()
        return [first.clone().requires_grad_(), *others]

    assert_checkpointing_keeps_gradients(deep.frozen(3), values)


@pytest.mark.parametrize("name", COMPILED)
def test_blocks_compile_without_graph_breaks(name: str) -> None:
    torch.compiler.reset()  # graphs compiled by other tests count toward the limit
    deep = COMPILED[name]
    model = deep.frozen(4)
    expected = model(*deep.values())
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for block in blocks:
            block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(*deep.values()), expected, **FLOAT32_DEEP)


# Flow models train toward what their previews follow: the same prediction, and a target between noise and latent.


@pytest.mark.parametrize("name", [name for name, base in BASES.items() if base.dit is not None or name == "lumina"])
@torch.no_grad()
def test_training_target_is_the_velocity_that_previews_follow(name: str, tmp_path: Path) -> None:
    """The tests of whole previews compare that prediction with diffusers'."""
    run, batch = open_run(name, BASES[name].build(tmp_path)), None
    text, objective, preview = run.arch.text, run.arch.objective, run.arch.preview
    clean = torch.randn(2, run.arch.codec.spec.channels, 8, 6, generator=torch.Generator().manual_seed(1))
    noised = objective.corrupt(clean, torch.Generator().manual_seed(2))
    conditioning = text.encode(run.models.text_encoders, text.tokenize(["a cat", "red dog, cat"]))
    inputs: Any = (run.models.denoiser, noised, conditioning, batch)
    predict = preview.predict(prompt_of(sampler=None, guidance_scale=1.0, cfg_trunc_ratio=1.0, renorm_cfg=0.0))
    torch.testing.assert_close(predict(*inputs), run.arch.predict(*inputs), rtol=0, atol=0)
    velocity = noised.noise_BCHW - noised.clean_BCHW
    target = -velocity if BASES[name].is_velocity_reversed else velocity
    torch.testing.assert_close(objective.target(noised), target, rtol=0, atol=0)
    s = noised.sigmas_B.view(-1, 1, 1, 1)
    torch.testing.assert_close(noised.latents_BCHW, (1 - s) * clean + s * noised.noise_BCHW, rtol=0, atol=1e-6)
