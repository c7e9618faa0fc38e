"""finetune/prepare_buckets_latents.py and training with the latents it has cached."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from PIL import Image

from finetune import merge_captions_to_metadata, prepare_buckets_latents
from library.data.sources.folders import metadata_file
from tests.running import make_images


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
