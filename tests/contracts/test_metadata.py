"""The metadata keys that readers of LoRA files rely on."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from PIL import Image
from safetensors import safe_open

from finetune import merge_captions_to_metadata, prepare_buckets_latents
from library.data.sources.folders import metadata_file
from tests.running import Finished, make_images

Train = Callable[..., Finished]

KEYS = json.loads((Path(__file__).parent / "data" / "metadata_keys.json").read_text())
ALWAYS, FOLDER_ONLY = KEYS["always"], KEYS["folder_only"]


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.slow
def test_a_plain_run_writes_these_94_keys(
    train: Train, base_arguments: list[str], tmp_path: Path, tiny_sd_file: Path
) -> None:
    train([*base_arguments, "--pretrained_model_name_or_path", str(tiny_sd_file), "--network_alpha", "2"]).ok()
    actual = metadata(tmp_path / "out" / "mine.safetensors")
    assert set(actual) == {*ALWAYS, *FOLDER_ONLY}
    assert len(actual) == 94
    assert actual["ss_network_alpha"] == "2.0" and actual["ss_network_dim"] == "4"
    assert actual["ss_base_model_version"] == "sd_v1" and actual["ss_v2"] == "False"
    assert actual["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert actual["modelspec.resolution"] == "64x64"
    assert actual["ss_text_encoder_lr"] == "None" and actual["ss_learning_rate"] == "0.001"
    assert actual["ss_optimizer"] == "torch.optim.adamw.AdamW"
    assert actual["ss_num_train_images"] == "12" and actual["ss_num_epochs"] == "1" and actual["ss_steps"] == "4"
    assert actual["ss_resolution"] == "(64, 64)" and actual["ss_min_bucket_reso"] == "None"
    assert actual["ss_bucket_info"] == "null"  # JSON null when buckets are off
    assert json.loads(actual["ss_dataset_dirs"]) == {"2_thing": {"n_repeats": 2, "img_count": 6}}
    assert sum(json.loads(actual["ss_tag_frequency"])["2_thing"].values()) == 6 * 4
    assert actual["ss_new_sd_model_hash"] == hashlib.sha256(tiny_sd_file.read_bytes()).hexdigest()
    assert actual["ss_sd_model_name"] == tiny_sd_file.name


@pytest.mark.slow
def test_the_model_hash_covers_the_data_in_the_file(train: Train, base_arguments: list[str], tmp_path: Path) -> None:
    train([*base_arguments, "--save_precision", "bf16"])
    data = (tmp_path / "out" / "mine.safetensors").read_bytes()
    header = struct.unpack("<Q", data[:8])[0]
    actual = metadata(tmp_path / "out" / "mine.safetensors")
    assert actual["sshs_model_hash"] == hashlib.sha256(data[8 + header :]).hexdigest()
    assert len(actual["sshs_legacy_hash"]) == 8


@pytest.mark.slow
def test_a_dataset_file_is_described_in_full(train: Train, base_arguments: list[str], tmp_path: Path) -> None:
    folder = make_images(tmp_path / "other", 3, seed=4)
    config = tmp_path / "data.toml"
    config.write_text(
        "[general]\ncaption_extension = '.txt'\n[[datasets]]\nresolution = 64\nbatch_size = 2\n"
        f"[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\nnum_repeats = 3\nkeep_tokens = 1\n"
    )
    train([*base_arguments, "--dataset_config", str(config), "--network_args", "rank_dropout=0"]).ok()
    actual = metadata(tmp_path / "out" / "mine.safetensors")
    assert not set(FOLDER_ONLY) & set(actual)
    (dataset,) = json.loads(actual["ss_datasets"])
    assert dataset["is_dreambooth"] is True and dataset["batch_size_per_device"] == 2
    assert dataset["num_train_images"] == 9 and dataset["resolution"] == [64, 64]
    (subset,) = dataset["subsets"]
    assert subset["img_count"] == 3 and subset["num_repeats"] == 3 and subset["keep_tokens"] == 1
    assert subset["image_dir"] == "other" and subset["is_reg"] is False
    assert json.loads(actual["ss_network_args"]) == {"rank_dropout": "0", "dropout": None}


@pytest.mark.slow
def test_the_resolution_of_the_model_spec_is_the_largest_of_the_datasets(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    folder = make_images(tmp_path / "other", 2, seed=4)
    config = tmp_path / "data.toml"
    subsets = f"[[datasets.subsets]]\nimage_dir = '{folder.as_posix()}'\n"
    sizes = ("64", "[128, 64]", "[64, 64]")
    config.write_text(
        "[general]\nbatch_size = 1\n" + "".join(f"[[datasets]]\nresolution = {s}\n{subsets}" for s in sizes)
    )
    train([*base_arguments, "--dataset_config", str(config), "--max_train_steps", "1"]).ok()
    assert metadata(tmp_path / "out" / "mine.safetensors")["modelspec.resolution"] == "128x64"


@pytest.mark.slow
def test_without_metadata_only_what_readers_need_is_kept(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    train([*base_arguments, "--no_metadata", "--metadata_title", "T", "--metadata_author", "A"])
    actual = metadata(tmp_path / "out" / "mine.safetensors")
    keys = {key for key in actual if not key.startswith("modelspec.")}
    assert keys == {
        "ss_v2",
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "sshs_model_hash",
        "sshs_legacy_hash",
    }
    assert actual["modelspec.title"] == "T" and actual["modelspec.author"] == "A"


# finetune/prepare_buckets_latents.py and training with the latents it has cached.


def describe(tmp_path: Path) -> Path:
    """Write three images, one of them wide, and a metadata file with one entry too many."""
    folder = make_images(tmp_path / "pictures", 2, side=72)
    Image.open(folder / "00.png").resize((160, 72)).save(folder / "wide.png")
    (folder / "wide.txt").write_text("a wide cat")
    out = tmp_path / "captions.json"
    assert merge_captions_to_metadata.main([str(folder), str(out), "--caption_extension", ".txt"]) == 0
    table = json.loads(out.read_text())
    table["elsewhere"] = {"caption": "no image"}
    out.write_text(json.dumps(table))
    return folder


def test_training_uses_the_prepared_latents(
    tmp_path: Path, fresh_process: None, tiny_sdxl_folder: Path, train: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = describe(tmp_path)
    make_images(tmp_path / "more", 1)
    (tmp_path / "more" / "00.png").rename(folder / "new.png")
    paths = [str(folder), str(tmp_path / "captions.json"), str(tmp_path / "out.json"), str(tiny_sdxl_folder)]
    sizes = ["--max_resolution", "64,64", "--min_bucket_reso", "32", "--max_bucket_reso", "128"]
    words = [*sizes, "--bucket_reso_steps", "32", "--flip_aug", "--batch_size", "2", "--max_data_loader_n_workers", "0"]
    with patch.object(metadata_file, "read_json", wraps=metadata_file.read_json) as reading:
        assert prepare_buckets_latents.main([*paths, *words]) == 0
    assert reading.call_count == 1  # the table is read once, then written and encoded
    assert (
        "skipping 1 of 4 images without an entry in" in caplog.text
        and "new.png; tools/captions_to_metadata.py" in caplog.text
    )
    table = json.loads((tmp_path / "out.json").read_text())
    assert {key: entry.get("train_resolution") for key, entry in table.items()} == {
        "00": [64, 64],
        "01": [64, 64],
        "wide": [96, 32],
        "elsewhere": None,
    }
    files = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npz")}
    assert sorted(files) == ["00_0072x0072_sdxl.npz", "01_0072x0072_sdxl.npz", "wide_0160x0072_sdxl.npz"]
    training = ["--pretrained_model_name_or_path", str(tiny_sdxl_folder), "--train_data_dir", str(folder), "--in_json",
                str(tmp_path / "out.json"), "--resolution", "64,64", "--enable_bucket", "--min_bucket_reso", "32",
                "--max_bucket_reso", "128", "--bucket_reso_steps", "32", "--flip_aug", "--cache_latents_to_disk",
                "--output_dir", str(tmp_path / "trained"), "--network_module", "networks.lora", "--network_dim", "2",
                "--learning_rate", "1e-3", "--max_train_steps", "1", "--max_data_loader_n_workers", "0"]  # fmt: skip
    done = train(training, "sdxl_train_network")
    assert done.status == 0 and "latent cache: 3 entries reused, 0 to encode" in done.stderr
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.npz")} == files


def test_the_error_for_a_model_without_a_unet_names_the_right_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.tiny.flux import build_tiny_flux

    paths = [str(describe(tmp_path)), str(tmp_path / "captions.json"), str(tmp_path / "out.json")]
    assert prepare_buckets_latents.main([*paths, build_tiny_flux(tmp_path / "flux", 5)[1]]) == 1
    assert "is a FLUX model; encode its images with its" in capsys.readouterr().err
    assert prepare_buckets_latents.main([str(tmp_path), *paths[1:], "none.safetensors"]) == 1
    assert "has no images; --recursive" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()
