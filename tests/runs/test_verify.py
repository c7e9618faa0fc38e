"""tools/verify.py on tiny models, with real training runs in subprocesses."""

import re
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.running import make_images
from tests.tiny.bases import BASES
from tools import verify

pytestmark = pytest.mark.usefixtures("fresh_process")  # reading options configures logging


def arguments_for(name: str, folder: Path, *more: str) -> list[str]:
    base = BASES[name]
    make_images(folder / "data" / "2_secretname", 4)
    return [
        "--script", f"{base.script}.py", *base.build(folder / "model"), "--train_data_dir", str(folder / "data"),
        "--caption_extension", ".txt", "--resolution", "64", "--network_module", base.module, "--network_dim", "4",
        "--learning_rate", "1e-3", "--max_data_loader_n_workers", "0", "--cache_latents", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "denoiser"),
    [
        ("flux", "first and last blocks differ from diffusers' class by "),
        pytest.param("sd", "diffusers' own UNet2DConditionModel", marks=pytest.mark.nightly),
        pytest.param("sd3", "first and last blocks differ from diffusers' class by ", marks=pytest.mark.nightly),
        pytest.param("anima", "first and last blocks differ from diffusers' class by ", marks=pytest.mark.nightly),
    ],
)
def test_a_correct_training_is_reported_as_correct(
    name: str, denoiser: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The user's length, start, previews and output name are ignored, lists of numbers are kept."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    user_options = [
        "--gradient_checkpointing", "--max_train_epochs", "99", "--output_name", "mine", "--output_dir", "nowhere",
        "--text_encoder_lr", "5e-5", "--resume", "nowhere", "--dry_run", "--initial_epoch", "3",
        "--sample_prompts", str(prompts), "--sample_every_n_steps", "1",
    ]  # fmt: skip
    assert verify.main(arguments_for(name, tmp_path, *user_options)) == 0
    block = capfd.readouterr().out.partition("paste from here")[2]
    assert f"ok    denoiser                {denoiser}" in block
    assert re.search(r"ok +memory mode +\d+ gradients in \d+ blocks equal those of the plain mode", block)
    assert "ok    20 steps                20 of 20 losses are finite" in block
    assert re.search(r"ok    resumed from step 10    identical \(\d+ tensors\)", block)
    assert re.search(r"-     time of a step          [\d.]+ s \(median of 15\), [\d.]+ s planned", block)
    assert "--gradient_checkpointing" in block and "WRONG" not in block
    for private in (str(tmp_path), "secretname", "mine", "nowhere", "prompts"):
        assert private not in block
    assert not (tmp_path / "nowhere").exists() and not Path("nowhere").exists()


@pytest.mark.nightly
def test_a_run_that_resumes_differently_is_reported_as_wrong(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = verify.Trial.train

    def train_and_spoil(self: verify.Trial) -> "subprocess.CompletedProcess[str]":
        done = train(self)
        if self.folder.name == "again":
            tensors = load_file(self.adapter)
            save_file({name: tensor + 1e-4 for name, tensor in tensors.items()}, self.adapter)
        return done

    monkeypatch.setattr(verify.Trial, "train", train_and_spoil)
    assert verify.main(arguments_for("sd", tmp_path, "--fit", "12GB")) == 1
    output = capfd.readouterr().out
    assert re.search(
        r"WRONG resumed from step 10    \d+ of \d+ tensors differ, by .* must be identical on a CPU", output
    )
    assert re.search(r"time of a step .* s planned", output), "as chosen by --fit"


def test_a_failed_training_is_reported_as_wrong_with_its_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = arguments_for("sd", tmp_path, "--network_weights", str(tmp_path / "missing.safetensors"))
    assert verify.main(arguments) == 1
    printed = capfd.readouterr()
    assert "WRONG 20 steps                failed: " in printed.out
    assert "missing.safetensors" in printed.err and "missing.safetensors" not in printed.out
