"""Training some text encoders while caching the outputs of the others."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.running import Finished, load_saved, make_images
from tests.tiny.bases import BASES

Run = Callable[..., Finished]
CACHED, ON_DISK = "--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk"


@pytest.fixture
def run(train: Callable[..., Finished], tmp_path: Path) -> Run:
    """Return `run(base, name, ...)`, which trains two steps of one image and writes `name`.safetensors."""
    make_images(tmp_path / "data" / "1_thing", 3, seed=63)
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    models: dict[str, list[str]] = {}

    def start(name: str, output: str, *more: str) -> Finished:
        base = BASES[name]
        model = models.get(name) or models.setdefault(name, base.build(tmp_path / name))
        return train([
            *model, "--train_data_dir", str(tmp_path / "data"), "--caption_extension", ".txt", "--resolution", "64",
            "--output_dir", str(tmp_path / "out"), "--output_name", output, "--network_module", base.module,
            "--network_dim", "4", "--learning_rate", "1e-2", "--seed", "5", "--max_data_loader_n_workers", "0",
            "--max_train_steps", "2", "--caption_dropout_rate", "0.3", *more,
        ], script=base.script)  # fmt: skip

    return start


def images_of(tmp_path: Path, name: str) -> list[bytes]:
    return [Image.open(path).tobytes() for path in sorted((tmp_path / "out" / "sample").glob(f"{name}_*.png"))]


@pytest.mark.parametrize(
    ("name", "trained", "extra"),
    [
        ("flux", {"te1"}, []),
        pytest.param("sd3", {"te1", "te2"}, [], marks=pytest.mark.nightly),
        pytest.param("flux", set(), ["--text_encoder_lr", "0"], marks=pytest.mark.nightly),
    ],
)
def test_the_adapter_equals_that_of_a_run_without_caches_bit_for_bit(
    run: Run, tmp_path: Path, name: str, trained: set[str], extra: list[str]
) -> None:
    """Validation and previews agree too, as the trained encoder's features include its adapter."""
    looks = [
        "--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "2", "--validation_split", "0.4",
        "--validate_every_n_steps", "2", *extra,
    ]  # fmt: skip
    runs = {"plain": [], "memory": [CACHED], "disk": [ON_DISK]}
    measured = {}
    for output, more in runs.items():
        done = run(name, output, *looks, *more)
        assert done.status == 0, done.stderr
        measured[output] = [line.split("loss")[1] for line in done.stderr.splitlines() if "validation after" in line]
    plain = load_saved(tmp_path, "plain")
    learned = {key.split("_")[1] for key, tensor in plain.items() if "lora_up" in key and tensor.abs().max() > 0}
    assert learned == {*trained, "unet"}
    for output in ("memory", "disk"):
        actual = load_saved(tmp_path, output)
        assert actual.keys() == plain.keys() and all(torch.equal(actual[key], plain[key]) for key in plain)
        assert measured[output] == measured["plain"] != []
        assert images_of(tmp_path, output) == images_of(tmp_path, "plain") != []


@pytest.mark.nightly
def test_the_disk_cache_serves_runs_that_train_only_the_denoiser(run: Run, tmp_path: Path) -> None:
    """The files contain the features of all untrained encoders."""
    assert run("flux", "both", ON_DISK).status == 0
    done = run("flux", "again", ON_DISK)
    assert done.status == 0 and "0 to encode, 0 stale" in done.stderr
    both, again = load_saved(tmp_path, "both"), load_saved(tmp_path, "again")
    assert all(torch.equal(both[key], again[key]) for key in both)
    done = run("flux", "alone", ON_DISK, "--network_train_unet_only")
    assert done.status == 0 and "0 to encode, 0 stale" in done.stderr
    assert run("flux", "fresh", CACHED, "--network_train_unet_only").status == 0
    alone, fresh = load_saved(tmp_path, "alone"), load_saved(tmp_path, "fresh")
    assert all(torch.equal(alone[key], fresh[key]) for key in fresh) and not any("lora_te" in key for key in alone)


def test_lumina_has_only_the_trained_encoder(run: Run, tmp_path: Path) -> None:
    assert run("lumina", "plain").status == 0
    done = run("lumina", "cached", ON_DISK)
    assert done.status == 0, done.stderr
    assert "--cache_text_encoder_outputs has no effect: every text encoder trains" in done.stderr
    plain, cached = load_saved(tmp_path, "plain"), load_saved(tmp_path, "cached")
    assert all(torch.equal(plain[key], cached[key]) for key in plain)
    assert not list((tmp_path / "data").rglob("*_te.npz"))


def test_encoders_without_adapters_may_all_be_freed(run: Run, tmp_path: Path) -> None:
    assert run("hunyuan_image", "alone", CACHED, "--network_train_unet_only").status == 0
    done = run("hunyuan_image", "cached", CACHED)
    assert done.status == 0, done.stderr
    alone, cached = load_saved(tmp_path, "alone"), load_saved(tmp_path, "cached")
    assert all(torch.equal(alone[key], cached[key]) for key in alone)
