"""The name of a base model, its model_index.json or a flag tells whether it is distilled."""

import json
import shutil
from pathlib import Path

import pytest

from library.architectures.flux_2.releases import DISTILLED_KLEIN
from library.architectures.krea2.assembly import TURBO as KREA2_TURBO
from library.architectures.zimage.assembly import TURBO as ZIMAGE_TURBO
from library.architectures.zimage.assembly import build
from library.architectures.zimage.options import ZImageOptions
from library.base.errors import UserError
from library.models.distilled import DistilledRelease, is_distilled
from tests.tiny.zimage import build_tiny_zimage
from zimage_train_network import setup_parser

PUBLISHED = {
    ZIMAGE_TURBO: {
        "Tongyi-MAI/Z-Image-Turbo": True,
        "Tongyi-MAI/Z-Image": False,
        "Tongyi-MAI/Z-Image-Base": False,
        "Tongyi-MAI/Z-Image-Omni-Base": False,
        "ostris/Z-Image-De-Turbo": False,
        "z_image_turbo_bf16.safetensors": True,
        "z_image_turbo_nvfp4.safetensors": True,
        "z_image_bf16.safetensors": False,
        "z_image_de_turbo_v1_bf16.safetensors": False,
        "z-image-turbo-fp8-e4m3fn.safetensors": True,
        "z-image-turbo_fp8_scaled_e4m3fn_KJ.safetensors": True,
        "z-image-base-bf16.safetensors": False,
        "zImageTurbo_v10.safetensors": True,
        "zImageTurbo_turbo.safetensors": True,
        "zImageDeTurbo_v1.safetensors": False,
        "zImageBase_base.safetensors": False,
        "ZImageTurbo": True,
        "Z-Image-Distilled": True,
        "zimage-deturbo.safetensors": False,
    },
    KREA2_TURBO: {
        "krea/Krea-2-Turbo": True,
        "krea/Krea-2-Raw": False,
        "turbo.safetensors": True,
        "raw.safetensors": False,
        "krea2_turbo_bf16.safetensors": True,
        "krea2_turbo_fp8_scaled.safetensors": True,
        "krea2_raw_bf16.safetensors": False,
        "krea2_de_turbo.safetensors": False,
        "krea2Turbo_v10.safetensors": True,
        "krea2Raw_v10.safetensors": False,
    },
    DISTILLED_KLEIN: {
        "black-forest-labs/FLUX.2-klein-4B": True,
        "black-forest-labs/FLUX.2-klein-base-4B": False,
        "black-forest-labs/FLUX.2-klein-9B": True,
        "black-forest-labs/FLUX.2-klein-base-9B": False,
        "flux-2-klein-4b.safetensors": True,
        "flux-2-klein-4b-fp8.safetensors": True,
        "flux-2-klein-base-4b.safetensors": False,
        "flux-2-klein-base-9b-fp8.safetensors": False,
        "flux-2-klein-9b-nvfp4.safetensors": True,
        "flux2Klein_9b.safetensors": True,
        "flux2Klein_9bBase.safetensors": False,
    },
}
TABLE = [(release, name, expected) for release, names in PUBLISHED.items() for name, expected in names.items()]


def test_the_table_has_forty_names() -> None:
    assert len(TABLE) == 40


@pytest.mark.parametrize(("release", "name", "expected"), TABLE, ids=[name for _, name, _ in TABLE])
def test_a_published_name_tells_whether_it_is_distilled(
    tmp_path: Path, release: DistilledRelease, name: str, expected: bool
) -> None:
    """As a download: a file, a folder, or a repository in the hub's cache. Other folders say nothing."""
    for parent in ("base_models", "database", "turbo", "klein"):
        path = tmp_path / parent / Path(name).name
        if path.suffix != ".safetensors":
            path.mkdir(parents=True)
        assert is_distilled(release, None, path) is expected
    organisation, _, repository = name.rpartition("/")
    if organisation:
        snapshot = tmp_path / "hub" / f"models--{organisation}--{repository}" / "snapshots" / "5f0e1b"
        snapshot.mkdir(parents=True)
        part = snapshot / "transformer" / "diffusion_pytorch_model.safetensors"
        for path in (snapshot, part, snapshot / "split_files" / "model.safetensors"):
            assert is_distilled(release, None, path) is expected


def test_a_file_in_a_diffusers_folder_has_the_name_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "FLUX.2-klein-base-4B"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    assert not is_distilled(DISTILLED_KLEIN, None, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert not is_distilled(DISTILLED_KLEIN, None, folder / "klein.safetensors")


def test_a_file_of_the_hubs_cache_tells_before_its_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Comfy-Org--flux2-klein" / "snapshots" / "0a"
    assert not is_distilled(DISTILLED_KLEIN, None, snapshot / "split_files" / "flux-2-klein-base-4b.safetensors")
    assert is_distilled(DISTILLED_KLEIN, None, snapshot / "split_files" / "transformer.safetensors")


@pytest.mark.parametrize("release", PUBLISHED)
def test_the_flag_decides_before_model_index_and_that_before_the_name(
    tmp_path: Path, release: DistilledRelease
) -> None:
    folder = tmp_path / "klein-turbo"
    folder.mkdir()
    for recorded in (True, False):
        (folder / "model_index.json").write_text(json.dumps({"is_distilled": recorded}))
        for path in (folder, folder / "transformer" / "a.safetensors", folder / "klein-turbo.safetensors"):
            assert is_distilled(release, None, path) is recorded
            assert is_distilled(release, not recorded, path) is not recorded


@pytest.mark.parametrize("name", ["z_image_turbo_base.safetensors", "zImageTurboDeTurbo.safetensors", "turbo-deturbo"])
def test_a_name_that_contradicts_itself_asks_for_the_flag(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} has 'turbo', .*set --model_version to say which it is"):
        is_distilled(ZIMAGE_TURBO, None, tmp_path / name)
    assert is_distilled(ZIMAGE_TURBO, True, tmp_path / name)


@pytest.mark.parametrize(("name", "num_steps"), [("zImageTurbo_v10", 8), ("z_image_de_turbo_v1", 50)])
def test_the_name_of_the_file_on_the_command_line_decides(tmp_path: Path, name: str, num_steps: int) -> None:
    command = build_tiny_zimage(tmp_path, 3)
    file = tmp_path / f"{name}.safetensors"
    shutil.copy(command[1], file)
    options = ZImageOptions.from_args(setup_parser().parse_args([command[0], str(file), *command[2:]]))
    assert build(options).preview.defaults.num_steps == num_steps
