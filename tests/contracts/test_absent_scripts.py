"""Scripts of sd-scripts that train something else than adapters end with what does their work here."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ABSENT = {  # everything in sd-scripts' root that trains, but for the scripts of adapters
    "a model": ("train_db", "fine_tune", "sdxl_train", "sd3_train", "flux_train", "lumina_train", "anima_train"),
    "a word": ("train_textual_inversion", "train_textual_inversion_XTI", "sdxl_train_textual_inversion"),
    "a ControlNet": (
        "train_control_net", "train_controlnet", "flux_train_control_net", "sdxl_train_control_net",
        "sdxl_train_control_net_lllite", "sdxl_train_control_net_lllite_old",
    ),
}  # fmt: skip
NAMES = [(name, what) for what, names in ABSENT.items() for name in names]


@pytest.mark.parametrize(("name", "what"), NAMES, ids=[name for name, _ in NAMES])
def test_it_ends_with_what_does_its_work(name: str, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"error: {name}.py trains ") and what in said and "use sd-scripts for that" in said
    named = re.findall(r"[\w/]+\.py", said)
    assert all((ROOT / file).is_file() for file in named)
    expected = {"sdxl_train": "sdxl_train_network.py", "train_db": "train_network.py"}.get(name)
    assert expected is None or expected in named


def test_it_needs_no_options_and_takes_any(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "sdxl_train.py"), "--pretrained_model_name_or_path", "x", "--in_json", "y"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: sdxl_train.py trains every weight of a model" in done.stderr


def test_the_page_names_what_is_not_here_at_all() -> None:
    """Scripts that draw, write captions or work on pictures, and are no part of a training."""
    page = (
        (ROOT / "docs" / "tools.md").read_text(encoding="utf-8").split("## Commands of sd-scripts that are not here")[1]
    )
    for name in (
        "gen_img.py", "gen_img_diffusers.py", "sdxl_gen_img.py", "*_minimal_inference.py", "make_captions.py",
        "make_captions_by_git.py", "tag_images_by_wd14_tagger.py", "canny.py", "detect_face_rotate.py",
        "latent_upscaler.py", "lora_diffusers.py", "merge_lora_old.py", *(f"{name}.py" for name, _ in NAMES),
    ):  # fmt: skip
        assert name in page, name
        assert not list(ROOT.rglob(f"{name}")) or name.removesuffix(".py") in dict(NAMES)
