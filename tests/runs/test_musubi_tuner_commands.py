"""musubi-tuner's commands cache and train every base model that has its options."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.checkpoints.headers import read_metadata
from tests.running import ROOT, Finished, small_run
from tests.runs.musubi_tuner import paths_of, run_command, run_script
from tests.tiny.base import Dit
from tests.tiny.bases import BASES

Train = Callable[..., Finished]
DITS = {name: base.dit for name, base in BASES.items() if base.dit is not None}
FAST = "flux_2 klein-base-4b"
RELEASES = {f"{name} {release}".strip(): (name, release) for name, dit in DITS.items() for release in dit.trained}
INVALID = (
    (["--text_encoder", "missing.safetensors"], "--text_encoder missing.safetensors does not exist"),
    (["--network_train_text_encoder_only"], "its text encoder cannot be trained"),
    (["--timestep_sampling", "ideogram4_shift"], "invalid choice: 'ideogram4_shift'"),
)


@pytest.mark.parametrize("case", [c if c == FAST else pytest.param(c, marks=pytest.mark.nightly) for c in RELEASES])
def test_the_commands_of_musubi_tuners_pages_cache_and_train(tmp_path: Path, case: str) -> None:
    """Training from caches needs neither VAE nor text encoder."""
    name, release = RELEASES[case]
    dit = DITS[name]
    model = dit.trained[release](tmp_path / "model")
    paths, version = paths_of(model, tmp_path), f" --model_version {release}" if release else ""
    latents = f"--dataset_config {{data}} --vae {{vae}}{version}"
    assert "latent cache: 0 entries reused, 3 to encode" in run_command(f"{name}_cache_latents", latents, paths)
    more = f" --{name} --skip_existing --keep_cache --num_workers 1"
    again = run_script("tools/cache_latents.py", latents.format(**paths) + more)
    assert "3 entries reused unchecked (--skip_cache_check), 0 to encode" in again
    texts = f"--dataset_config {{data}} --text_encoder {{text}} --batch_size 2{version}"
    log = run_command(f"{name}_cache_text_encoder_outputs", texts, paths)
    assert "text cache: 0 files reused, 4 to encode" in log  # three captions and the empty one
    paths["tokenizer"] = str(Path(model[1]).parent)  # where there is no text encoder next to it
    log = run_command(f"{name}_train_network", f"{dit.training}{version} --tokenizer_cache_dir {{tokenizer}}", paths)
    assert "latent cache: 3 entries reused, 0 to encode" in log
    assert "text cache: 4 files reused, 0 to encode" in log
    assert ("which is distilled" in log) == (release == "dev")
    file = tmp_path / "out" / "name-of-lora.safetensors"
    tensors = load_file(file)
    assert len(tensors) == 2 * dit.num_adapted
    key, width = dit.saved
    assert tensors[f"{key}.lora_A.weight"].shape == (32, width)
    assert any(float(t.abs().max()) > 0 for key, t in tensors.items() if key.endswith("lora_B.weight"))
    metadata = read_metadata(file)
    assert metadata["ss_base_model_version"] == name
    architecture = f"Flux.2-{release.replace('base-', '')}" if release else dit.architectures["files"]
    assert metadata["modelspec.architecture"] == f"{architecture}/lora"


def test_debug_mode_lists_the_images_and_encodes_nothing(tmp_path: Path) -> None:
    model = DITS["zimage"].trained[""](tmp_path / "model")
    paths = paths_of(model, tmp_path)
    words = "--dataset_config {data} --vae {vae} --disable_cudnn_backend --debug_mode console --console_width 40"
    log = run_command("zimage_cache_latents", words, paths)
    assert "--console_width has no effect: images are listed, and not drawn in the terminal" in log
    assert "trained at " in log and "to encode" not in log and not [*(tmp_path / "cache").rglob("*.safetensors")]


@pytest.fixture(scope="module", params=DITS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def dit(name: str) -> Dit:
    return DITS[name]


@pytest.fixture(scope="module")
def model(dit: Dit, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return dit.build(tmp_path_factory.mktemp("model"), 31)


@pytest.fixture
def run(train: Train, name: str, model: list[str], images: Path, tmp_path: Path) -> Train:
    """Return `run(...)`, which trains two steps with more options."""
    arguments = [*model, *small_run(images, tmp_path, BASES[name].module, "2")]
    return lambda *more: train([*arguments, *more], BASES[name].script)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("command", "flag"), [("cache_latents", "--vae"), ("cache_text_encoder_outputs", "--text_encoder")]
)
def test_a_caching_command_names_the_missing_file(
    name: str, model: list[str], tmp_path: Path, command: str, flag: str
) -> None:
    paths = paths_of(model, tmp_path)
    line = [
        sys.executable,
        str(ROOT / "src" / "musubi_tuner" / f"{name}_{command}.py"),
        "--dataset_config",
        paths["data"],
    ]
    for more, message in (
        (["--device", "gpu:7"], "--device gpu:7 cannot be used"),
        ([], f"{flag} is missing: name its file or folder, or the whole model with --dit"),
        ([flag, paths["dit"]], f"{flag} {paths['dit']} is not "),
        ([flag, paths["vae"], "--batch_size", "0"], "--batch_size is 0, but must be at least 1"),
    ):
        done = subprocess.run([*line, *more], capture_output=True, text=True, timeout=300)
        assert done.returncode == 1 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


def test_training_continues_from_a_musubi_tuner_file(run: Train, dit: Dit, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    theirs = {}
    for stem, (rows, columns) in dit.theirs_in_file.items():
        theirs[f"lora_unet_{stem}.lora_down.weight"] = torch.randn(2, columns, generator=generator)
        theirs[f"lora_unet_{stem}.lora_up.weight"] = 0.01 * torch.randn(rows, 2, generator=generator)
        theirs[f"lora_unet_{stem}.alpha"] = torch.tensor(1.0)
    save_file(theirs, tmp_path / "musubi.safetensors")
    run("--network_weights", str(tmp_path / "musubi.safetensors"), "--dim_from_weights").ok()
    saved = load_file(tmp_path / "out" / "mine.safetensors")
    ranks = {key.removesuffix(".lora_A.weight"): t.shape[0] for key, t in saved.items() if key.endswith("A.weight")}
    assert ranks == dit.continued_ranks


@pytest.mark.parametrize("place", range(len(INVALID)))
def test_invalid_values_end_the_run_before_loading(run: Train, place: int) -> None:
    words, message = INVALID[place]
    done = run(*words)
    assert done.status != 0 and message in done.stderr
