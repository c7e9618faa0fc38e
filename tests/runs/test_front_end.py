"""tools/front_end.py installs the suite into a front end's folder; scripts start as the front end starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from library.architectures.specs import list_specs
from library.base.version import NAME, VERSION
from library.front_ends.layouts import ABSENT, FOLDERS, PREFIXES
from tests.running import make_images
from tests.tiny.bases import BASES
from tools.front_end import main


@pytest.fixture
def front_end(tmp_path: Path) -> Path:
    """Create a front end like kohya_ss with its environment inside the scripts folder, as in LoRA_Easy."""
    folder = tmp_path / "gui"
    (folder / "sd-scripts" / "venv" / "bin").mkdir(parents=True)
    (folder / "sd-scripts" / "train_network.py").write_text("raise SystemExit('the old one')\n")
    (folder / "sd-scripts" / "only_there.py").touch()
    return folder


def start(front_end: Path, script: str, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": "", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(front_end / "sd-scripts" / script), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=front_end, env=environment, timeout=280)


def test_a_training_runs_from_the_front_end_and_the_folder_can_be_restored(front_end: Path, tmp_path: Path) -> None:
    assert main([str(front_end)]) == 0
    assert (front_end / "sd-scripts" / "venv" / "bin").is_dir() and not (front_end / "sd-scripts" / "tests").exists()
    installed = (front_end / "sd-scripts" / "requirements.txt").read_text("utf-8").splitlines()
    ours = (Path(__file__).parents[2] / "requirements.txt").read_text("utf-8").splitlines()
    assert [line for line in ours if line not in installed] == ["torch>=2.6"]  # the front end keeps its own torch
    assert [line for line in installed if line not in ours] == ["-e ."]  # LoRA_Easy imports `library` from outside
    make_images(tmp_path / "data" / "1_thing", 2)
    done = start(
        front_end, "train_network.py", *BASES["sd"].build(tmp_path / "model"), "--train_data_dir",
        str(tmp_path / "data"), "--resolution", "64", "--network_module", "networks.lora", "--max_train_steps", "1",
        "--output_dir", str(tmp_path / "out"), "--output_name", "mine", "--max_data_loader_n_workers", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "mine.safetensors").is_file()
    assert f"{NAME} {VERSION}" in done.stderr.splitlines()[0]
    own_adapter = front_end / "sd-scripts/networks/own.py"
    own_adapter.write_text("mine")
    assert main([str(front_end)]) == 0  # a second call updates
    assert own_adapter.read_text() == "mine" and main([str(front_end), "--check"]) == 0
    assert main([str(front_end), "--restore"]) == 0
    assert sorted(path.name for path in front_end.iterdir()) == ["sd-scripts", "sd-scripts.aside"]
    assert [path for path in (front_end / "sd-scripts.aside").rglob("*") if path.is_file()] == [
        front_end / "sd-scripts.aside/networks/own.py"
    ]
    assert sorted(path.name for path in (front_end / "sd-scripts").iterdir()) == [
        "only_there.py",
        "train_network.py",
        "venv",
    ]
    assert main([str(front_end), "--restore"]) == 1


@pytest.mark.parametrize("script", ["sdxl_train.py", "train_db.py", "finetune/tag_images_by_wd14_tagger.py"])
def test_absent_scripts_exit_with_a_one_sentence_message(script: str, front_end: Path) -> None:
    assert main([str(front_end)]) == 0
    done = start(front_end, script, "--pretrained_model_name_or_path", "x")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"{script} ") and done.stderr.count("\n") == 1 and "sd-scripts" in done.stderr


def test_suggested_scripts_exist_and_none_is_shadowed() -> None:
    root = Path(__file__).parents[2]
    assert not any((root / name).exists() for name in ABSENT)
    suggested = {
        word for text in ABSENT.values() for word in text.replace(",", " ").split() if word.endswith("_network.py")
    }
    assert suggested and all((root / name).is_file() for name in suggested)


def test_musubi_tuners_own_command_line_starts_this_suites_script(tmp_path: Path) -> None:
    """The training ends at the missing model, which is named by musubi-tuner's flag."""
    script = tmp_path / "musubi-tuner" / "src" / "musubi_tuner" / "zimage_train_network.py"
    script.parent.mkdir(parents=True)
    script.write_text("raise SystemExit('the old one')\n")
    assert main([str(tmp_path / "musubi-tuner")]) == 0
    command = [sys.executable, str(script), "--dit", "none.safetensors", "--output_dir", str(tmp_path)]
    command += ["--network_module", "networks.lora_zimage", "--train_data_dir", str(tmp_path), "--resolution", "64"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=280)
    assert done.returncode == 1 and f"{NAME} {VERSION}" in done.stderr.splitlines()[0]
    assert "--dit none.safetensors does not exist" in done.stderr, done.stderr


def test_every_script_of_sd_scripts_that_this_suite_lacks_is_replaced() -> None:
    prefixes = {spec.script.removesuffix("train_network.py") for spec in list_specs()}
    assert prefixes == set(PREFIXES)


def test_other_folders_are_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "gone")]) == 1 and main([str(tmp_path)]) == 1
    assert "is not a folder" in (err := capsys.readouterr().err) and FOLDERS[0] in err
    assert main([str(Path(__file__).parents[3])]) == 1 and "contains this suite" in capsys.readouterr().err
