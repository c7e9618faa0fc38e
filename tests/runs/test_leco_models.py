"""train_leco.py on every base model: it recognises the file, trains, resumes bit for bit, and saves memory."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from library.checkpoints.files import load_state_dict
from library.checkpoints.headers import read_metadata
from tests.running import Finished
from tests.tiny.bases import BASES

Leco = Callable[..., Finished]

SLIDER = """
resolution = 64
[[targets]]
target_class = "a cat"
positive = "red"
negative = "blue dog"
"""


QUICK = ("sd", "flux")


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=() if n in QUICK else pytest.mark.nightly) for n in BASES]
)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the arguments that select a tiny model, without the flag that its own script needs."""
    words = BASES[name].build(tmp_path_factory.mktemp("model"))
    if "--model_type" in words:
        del words[(at := words.index("--model_type")) : at + 2]
    return [word for word in words if word != "--v2"]


@pytest.fixture
def leco(train: Callable[..., Finished], model: list[str], tmp_path: Path) -> Leco:
    """Return `leco(folder, ...)`, which trains three steps of a slider into a folder of `tmp_path`."""
    (tmp_path / "slider.toml").write_text(SLIDER)

    def run(folder: str, *more: str, status: int = 0) -> Finished:
        words = [
            *model, "--prompts_file", str(tmp_path / "slider.toml"), "--output_dir", str(tmp_path / folder),
            "--output_name", "mine", "--learning_rate", "1e-2", "--max_train_steps", "3", "--max_denoising_steps", "3",
            "--seed", "5", "--no_report", *more,
        ]  # fmt: skip
        done = train(words, script="train_leco")
        assert done.status == status, done.stderr
        return done

    return run


def test_a_resumed_run_equals_the_uninterrupted_one_with_every_memory_mode(
    leco: Leco, name: str, tmp_path: Path
) -> None:
    uninterrupted = leco("whole", "--save_state", "--save_every_n_steps", "1")
    state = tmp_path / "whole" / "mine-step00000001-state"
    rest = leco("rest", "--resume", str(state), "--gradient_checkpointing", "--cpu_offload_checkpointing")
    assert len(uninterrupted.losses) == 3 and rest.losses == uninterrupted.losses[1:]
    expected, other = (load_state_dict(tmp_path / folder / "mine.safetensors") for folder in ("whole", "rest"))
    assert expected.keys() == other.keys() and all(torch.equal(expected[key], other[key]) for key in expected)
    assert all(key.startswith(("lora_unet_", "diffusion_model.", "transformer.")) for key in expected)
    ups = [tensor for key, tensor in expected.items() if "lora_up" in key or "lora_B" in key]
    assert sum(float(tensor.abs().max()) > 0 for tensor in ups) == len(ups) > 3
    metadata = read_metadata(tmp_path / "whole" / "mine.safetensors")
    assert metadata["ss_leco_denoise_guidance_scale"] == ("1.0" if BASES[name].draws_without_guidance else "3.0")
    assert metadata["ss_leco_prompt_count"] == "4"
    warnings = [
        line for line in uninterrupted.stderr.splitlines() if "no effect" in line or "converts the output" in line
    ]
    assert not [line for line in warnings if "--vae" not in line], warnings


SWEPT = ["--sweep", "learning_rate=1e-2,2e-2"]


@pytest.mark.nightly
def test_each_run_of_a_sweep_equals_the_one_of_its_own(leco: Leco, name: str, tmp_path: Path) -> None:
    if name != "sd":
        pytest.skip("like sd")
    leco("sweep", *SWEPT)
    for rate in ("1e-2", "2e-2"):
        leco(rate, "--learning_rate", rate)
        separate = load_state_dict(tmp_path / rate / "mine.safetensors")
        other = load_state_dict(tmp_path / "sweep" / f"mine-lr{rate}.safetensors")
        assert separate.keys() == other.keys() and all(torch.equal(separate[key], other[key]) for key in separate)


@pytest.mark.nightly
def test_the_memory_of_a_step_is_planned(leco: Leco, name: str) -> None:
    """Only prompts are encoded, so there is no stage for images and no advice about their size."""
    done = leco("fit", "--fit", "8GB", "--max_train_steps", "1")
    assert "matches your options" in done.stderr or "To pin this choice" in done.stderr
    assert "peak of the run: training" in done.stderr and "encoding images" not in done.stderr
    done = leco("small", "--fit", "700MB", status=1)
    assert "a smaller batch_size or resolution in the --prompts_file" in done.stderr
