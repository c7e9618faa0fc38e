"""Diffusers folders of a pipeline that no script trains are refused with the name of that pipeline."""

import json
from pathlib import Path

import pytest

from library.architectures.specs import list_specs
from library.base.errors import UserError
from library.commands.base_models import open_base_model
from library.models.identify import refuse_other_folder
from tests.running import SCRIPTS, Finished, make_images

UNKNOWN = ("SanaPipeline", "QwenImagePipeline", "PixArtSigmaPipeline")


def write_folder(path: Path, class_name: str | None) -> Path:
    path.mkdir()
    (path / "model_index.json").write_text(json.dumps({} if class_name is None else {"_class_name": class_name}))
    return path


@pytest.mark.parametrize("script", sorted(SCRIPTS.keys() - {"diffusers_train_network"}))
@pytest.mark.parametrize("class_name", UNKNOWN[:2])
def test_no_script_accepts_the_folder_of_an_unknown_pipeline(
    train, tmp_path: Path, script: str, class_name: str
) -> None:
    folder = write_folder(tmp_path / "model", class_name)
    make_images(tmp_path / "data" / "1_a", 1)
    done: Finished = train(
        ["--pretrained_model_name_or_path", str(folder), "--train_data_dir", str(tmp_path / "data"), "--resolution",
         "64", "--output_dir", str(tmp_path / "out"), "--network_module", "networks.lora"], script=script,
    )  # fmt: skip
    assert done.status == 1 and "Traceback" not in done.stderr
    assert f"{folder}: its model_index.json names {class_name}, which has no script of its own" in done.stderr
    assert "try diffusers_train_network.py" in done.stderr


def test_the_error_for_a_known_pipeline_names_its_script_and_unnamed_folders_pass(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"this is an SDXL model; use sdxl_train_network\.py"):
        refuse_other_folder(list_specs(), "--x", write_folder(tmp_path / "a", "StableDiffusionXLPipeline"), "flux")
    with pytest.raises(UserError, match=r"this is an SD 1\.x model; use train_network\.py"):
        refuse_other_folder(list_specs(), "--x", write_folder(tmp_path / "b", "StableDiffusionPipeline"), "flux")
    refuse_other_folder(list_specs(), "--x", write_folder(tmp_path / "c", "FluxPipeline"), "flux")
    refuse_other_folder(list_specs(), "--x", write_folder(tmp_path / "d", None), "flux")
    with pytest.raises(UserError, match=r"this is a Chroma model; add --model_type chroma"):
        refuse_other_folder(list_specs(), "--x", write_folder(tmp_path / "f", "ChromaPipeline"), "flux")
    custom = write_folder(tmp_path / "e", "SomebodysOwnPipeline")
    (custom / "unet").mkdir()
    refuse_other_folder(list_specs(), "--x", custom, "sd1")  # its U-Net takes precedence over its name


@pytest.mark.parametrize("class_name", UNKNOWN)
def test_the_folder_of_a_pipeline_without_its_denoiser_is_refused(tmp_path: Path, class_name: str) -> None:
    with pytest.raises(UserError, match=rf"--sd_model .* names no model of {class_name} that draws"):
        open_base_model("--sd_model", write_folder(tmp_path / "model", class_name))
