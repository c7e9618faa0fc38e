"""custom_attributes.timestep_sampling.offset shifts the noise levels of its own subset only."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from library.base.errors import UserError
from library.data.description.dataset_file import load_dataset_config
from library.diffusion.objective import build_ddpm
from library.options.training.loss import LossOptions
from library.options.training.noise import NoiseOptions
from library.training.models.opening import idle_offsets
from library.training.step.losses import add_noise_to
from tests.tiny.bases import BASES
from tests.unit.data.builders import write_config

OFFSETS = [0.0, 0.5, -0.25]
MODELS = [name for name, base in BASES.items() if base.is_flow and not base.spec.script_flag]


def objective_of(model: str, words: Sequence[str]) -> Any:
    base = BASES[model]
    parser = importlib.import_module(base.script).setup_parser()
    return base.assembly.build_objective(base.spec.options.from_args(parser.parse_args(words)))


def noised(objective: Any, attributes: list[dict[str, Any]]) -> Any:
    latents_BCHW = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(81))
    codec = SimpleNamespace(normalize=lambda latents: latents)
    context = SimpleNamespace(
        arch=SimpleNamespace(objective=objective, codec=codec), seed=82, device=torch.device("cpu")
    )
    batch = SimpleNamespace(latents_BCHW=latents_BCHW, attributes=attributes, concept=None)
    return add_noise_to(context, batch, 5)  # type: ignore[arg-type]


def logits(sigmas_B: Tensor) -> Tensor:
    return torch.logit(sigmas_B.double())


@pytest.mark.parametrize("model", MODELS)
def test_the_offset_shifts_the_logit_of_a_noise_level(model: str) -> None:
    objective = objective_of(model, BASES[model].offset_words)
    plain = noised(objective, [{}, {"other": 1}, {"timestep_sampling": {}}])
    moved = noised(objective, [{"timestep_sampling": {"offset": offset}} for offset in OFFSETS])
    difference_B = logits(moved.sigmas_B) - logits(plain.sigmas_B)
    atol = 0.05 if model == "sd3" else 1e-4  # whole thousandths there
    torch.testing.assert_close(
        difference_B, BASES[model].offset_factor * torch.tensor(OFFSETS).double(), rtol=0, atol=atol
    )
    assert torch.equal(moved.noise_BCHW, plain.noise_BCHW) and moved.sigmas_B[0] == plain.sigmas_B[0]


@pytest.mark.parametrize(
    "words", [["--weighting_scheme", "logit_normal", "--discrete_flow_shift", "1"], ["--timestep_sampling", "logsnr"]]
)
def test_the_offset_shifts_other_levels_in_the_same_direction(words: list[str]) -> None:
    objective = objective_of("flux", words)
    plain, moved = noised(objective, [{}] * 3), noised(objective, [{"timestep_sampling": {"offset": 0.5}}] * 3)
    assert (moved.sigmas_B > plain.sigmas_B).all()


def config_of(tmp_path: Path, attributes: str) -> Any:
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{here}/cat'\n"
    return load_dataset_config(write_config(tmp_path / "data.toml", f"{text}custom_attributes = {attributes}\n"))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ("{ timestep_sampling = 0.5 }", "timestep_sampling is 0.5, but must be a table"),
        ("{ timestep_sampling = { offset = 'up' } }", "timestep_sampling.offset is 'up', but must be a number"),
        ("{ timestep_sampling = { offset = nan } }", "timestep_sampling.offset is nan, but must be a number"),
    ],
)
def test_an_invalid_offset_is_refused_naming_its_location(tmp_path: Path, attributes: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        config_of(tmp_path, attributes)
    assert message in str(error.value) and "['subsets'][0]['custom_attributes']" in str(error.value)


def test_an_offset_without_effect_is_reported(tmp_path: Path) -> None:
    config = config_of(tmp_path, "{ timestep_sampling = { offset = -1 } }")
    uniform = objective_of("anima", ["--timestep_sampling", "uniform"])
    for objective in (uniform, build_ddpm(NoiseOptions(), LossOptions(), predicts_velocity=False)):
        (line,) = idle_offsets(config, objective)
        assert line.startswith(f"timestep_sampling.offset of {tmp_path.as_posix()}/cat has no effect")
        assert not [*idle_offsets(config_of(tmp_path, "{}"), objective)]
    assert not [*idle_offsets(config, objective_of("anima", []))]
