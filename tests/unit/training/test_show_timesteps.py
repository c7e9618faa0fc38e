"""The sampled distribution of noise levels, and its offset for a subset."""

import importlib
import logging
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from library.base.errors import UserError
from library.data.description.dataset_file import load_dataset_config
from library.diffusion.objective import build_ddpm
from library.options.training.loss import LossOptions
from library.options.training.noise import NoiseOptions
from library.training.command_line.main import main
from library.training.command_line.show_timesteps import BAR_WIDTH, MARGIN, NUM_BINS, NUM_DRAWS, PLOT_HEIGHT
from library.training.models.opening import idle_offsets
from library.training.step.losses import add_noise_to
from tests.tiny.bases import BASES
from tests.unit.data.builders import write_config

Cdf = Callable[[float], float]
MODELS = [name for name, base in BASES.items() if base.is_flow and not base.spec.script_flag]


def run(model: str, *words: str) -> int:
    base, script = BASES[model], importlib.import_module(BASES[model].script)
    parts = base.assembly
    return main(
        script.setup_parser(),
        base.spec.options,
        parts.build,
        list(words),
        latents=parts.LATENTS,
        objective=parts.build_objective,
    )


def normal_behind(mean: float, deviation: float, shift: float = 1.0) -> Cdf:
    """Return the distribution function of the sigmoid of a normal value; a shift adds its logarithm to the logit."""

    def cdf(level: float) -> float:
        if not 0 < level < 1:
            return float(level >= 1)
        logit = math.log(level / (1 - level)) - math.log(shift)
        return 0.5 * (1 + math.erf((logit - mean) / (deviation * math.sqrt(2))))

    return cdf


def shares_of(cdf: Cdf) -> list[float]:
    edges = [cdf(i / NUM_BINS) for i in range(NUM_BINS + 1)]
    return [after - before for before, after in pairwise(edges)]


def printed(text: str) -> list[tuple[float, float]]:
    """Return the share and loss weight of each row."""
    rows = [line.split("-", 1)[1].split() for line in text.splitlines() if "%" in line]
    return [(float(row[1].rstrip("%")) / 100, float(row[2])) for row in rows]


FLUX_1024 = math.exp(1.15)  # at 4096 tokens, the larger end
LUMINA_512_256 = math.exp(0.5 + (512 - 256) * (1.15 - 0.5) / (4096 - 256))  # at 32 x 16 tokens


def evenly_pushed(level: float) -> float:
    """Return the distribution function of a uniform value pushed by the shift of an image of 512 x 256 pixels."""
    return min(max(level / (LUMINA_512_256 - (LUMINA_512_256 - 1) * level), 0.0), 1.0)


@pytest.mark.parametrize(
    ("model", "words", "cdf"),
    [
        *((n, [], normal_behind(0, 1, b.default_shift)) for n, b in BASES.items() if b.default_shift is not None),
        ("krea2", ["--show_timesteps_resolution", "1280"], normal_behind(0, 1, math.exp(1.15))),
        ("flux_2", ["--show_timesteps_resolution", "256"], normal_behind(0, 1, math.exp(0.5))),
        (
            "flux_2",
            ["--timestep_sampling", "logsnr", "--logit_mean", "1", "--show_timesteps_offset", "0.5"],
            normal_behind(-0.25, 0.5),
        ),
        ("flux", ["--timestep_sampling", "flux_shift"], normal_behind(0, 1, FLUX_1024)),
        (
            "flux",
            ["--timestep_sampling", "flux_shift", "--show_timesteps_resolution", "256"],
            normal_behind(0, 1, math.exp(0.5)),
        ),
        (
            "hunyuan_image",
            ["--timestep_sampling", "shift", "--sigmoid_scale", "0.8", "--show_timesteps_offset", "-0.5"],
            normal_behind(-0.4, 0.8, 5.0),
        ),
        ("flux", ["--model_type", "chroma", "--timestep_sampling", "sigmoid"], normal_behind(0, 1)),
        ("lumina", ["--show_timesteps_offset", "0.5"], normal_behind(0.5, 1, 6.0)),
        ("lumina", ["--timestep_sampling", "nextdit_shift", "--show_timesteps_resolution", "512,256"], evenly_pushed),
        (
            "sd3",
            ["--weighting_scheme", "logit_normal", "--training_shift", "3", "--show_timesteps_offset", "0.3"],
            normal_behind(0.3, 1, 3.0),
        ),
        (
            "flux",
            ["--weighting_scheme", "logit_normal", "--discrete_flow_shift", "1", "--show_timesteps_offset", "0.4"],
            normal_behind(0.4, 1),
        ),
        ("anima", ["--timestep_sampling", "uniform", "--max_timestep", "500"], lambda level: min(2 * level, 1)),
    ],
)
def test_the_table_shows_the_sampled_distribution(
    model: str, words: list[str], cdf: Cdf, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, "--show_timesteps", "console", "--seed", "12", *words) == 0
    shares = [share for share, _ in printed(capsys.readouterr().out)]
    edge = 1e-3 if "--weighting_scheme" in words else 0  # the table of sigma and SD3's levels are whole thousandths
    expected, expected_moved = (
        shares_of(cdf),
        shares_of(lambda level: cdf(level + edge) if 0 < level < 1 else cdf(level)),
    )
    for share, low, high in zip(
        shares, map(min, expected, expected_moved), map(max, expected, expected_moved), strict=True
    ):
        error = 4.5 * math.sqrt(high / NUM_DRAWS) + 0.5e-4  # of counting, and the rounding of what is printed
        assert low - error <= share <= high + error


def test_the_table_shows_the_loss_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("anima", "--show_timesteps", "console", "--weighting_scheme", "sigma_sqrt") == 0
    weights = [weight for _, weight in printed(capsys.readouterr().out)]
    assert weights == pytest.approx([((i + 0.5) / NUM_BINS) ** -2 for i in range(NUM_BINS)], rel=1e-3)


@pytest.mark.parametrize("model", MODELS)
def test_the_chart_has_bars_as_high_as_the_shares(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--seed", "4", "--output_dir", str(tmp_path / "new"), "--output_name", "cat"]
    assert run(model, "--show_timesteps", "image", *words) == run(model, "--show_timesteps", "console", *words) == 0
    shares = [share for share, _ in printed(capsys.readouterr().out)]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cat-timesteps.png"]
    image = Image.open(tmp_path / "new" / "cat-timesteps.png")
    for i, share in enumerate(shares):
        column = [image.getpixel((MARGIN + i * BAR_WIDTH + 2, MARGIN + y)) for y in range(PLOT_HEIGHT)]
        filled = [y for y, colour in enumerate(column) if colour == (70, 110, 180)]
        height = PLOT_HEIGHT - min(filled, default=PLOT_HEIGHT)
        assert abs(height - PLOT_HEIGHT * share / max(shares)) <= 4, i  # the line of weights covers up to three pixels


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["image"], "--show_timesteps image has no place for its file; give --output_dir"),
        (["console", "--show_timesteps_resolution", "1024x768"], "--show_timesteps_resolution is '1024x768'"),
        (["console", "--show_timesteps_resolution", "0"], "--show_timesteps_resolution is '0'"),
    ],
)
def test_invalid_values_give_errors_in_sentences(
    words: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert run("flux", "--show_timesteps", *words) == 1
    assert message in caplog.text and "Traceback" not in caplog.text


def test_an_offset_without_effect_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert run("sd3", "--show_timesteps", "console", "--show_timesteps_offset", "0.5") == 0
    assert "--show_timesteps_offset 0.5 has no effect" in caplog.text


# custom_attributes.timestep_sampling.offset shifts the noise levels of its own subset only.

OFFSETS = [0.0, 0.5, -0.25]


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
