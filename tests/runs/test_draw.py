"""tools/draw.py compared with the run's previews, the merged model and the base model."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.running import Finished, make_images
from tests.tiny.bases import BASES
from tools import contact_sheet, draw, merge_lora

Train = Callable[..., Finished]
PROMPT = "a red cat --w 64 --h 64 --s 2 --d 3 --n blue"
OTHERS = [pytest.param(name, marks=pytest.mark.nightly) for name in BASES if name not in ("sd", "flux")]


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path)).astype(int)


def train_adapter(train: Train, name: str, folder: Path, *more: str) -> tuple[list[str], Path]:
    """Train two steps with a final preview; return the model arguments and the output folder."""
    base = BASES[name]
    make_images(folder / "data" / "1_thing", 2, seed=len(name))
    (folder / "prompts.txt").write_text(PROMPT)
    model, out = base.build(folder / "model"), folder / "out"
    words = [
        *model, "--train_data_dir", str(folder / "data"), "--caption_extension", ".txt", "--resolution", "64",
        "--output_dir", str(out), "--output_name", "mine", "--network_module", base.module, "--network_dim", "4",
        "--network_alpha", "4", "--learning_rate", "3e-2", "--max_train_steps", "2", "--seed", "5",
        "--max_data_loader_n_workers", "0", "--sample_prompts", str(folder / "prompts.txt"),
        "--sample_every_n_steps", "2", "--sample_at_first", "--mixed_precision", "no", *more,
    ]  # fmt: skip
    train(words, script=base.script).ok()
    return model, out


def preview(out: Path, event: str) -> Any:
    (path,) = (out / "sample").glob(f"mine_{event}_00_*.png")
    return pixels(path)


@pytest.mark.parametrize("name", ["sd", "flux", *OTHERS])
def test_strengths_range_from_the_base_image_to_the_preview(name: str, train: Train, tmp_path: Path) -> None:
    model, out = train_adapter(train, name, tmp_path)
    at = model.index("--pretrained_model_name_or_path")
    words = [model[at + 1], *model[:at], *model[at + 2 :], "--adapter", str(out / "mine.safetensors")]
    if "--model_type" in words:  # recognised from the file
        at = words.index("--model_type")
        del words[at : at + 2]
    drawn = tmp_path / "drawn"
    assert draw.main([*words, "--prompt", PROMPT, "--strengths", "0", "0.5", "1", "--output", str(drawn)]) == 0
    base, half, full = (pixels(drawn / f"01_{factor}_3.png") for factor in ("0", "0.5", "1"))
    assert np.abs(base - preview(out, "e000000")).max() <= 1
    assert np.abs(full - preview(out, "000002")).max() <= 1
    assert np.abs(half - base).max() > 2 and np.abs(half - full).max() > 2
    assert Image.open(drawn / "strengths.png").size[1] > 3 * 64


def test_other_images_go_to_another_folder_unless_one_is_named(
    tiny_sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words, prompts = [str(tiny_sd_folder), "--prompt"], ("a cat", "a dog")
    for prompt in (*prompts, *prompts):
        assert draw.main([*words, f"{prompt} --w 64 --h 64 --s 1"]) == 0
    first, second = (Path(f"output/{name}/01_1.png") for name in ("drawn", "drawn-2"))
    assert sorted(Path("output").rglob("*.png")) == [first, second]
    assert not np.array_equal(pixels(first), pixels(second))
    content = first.read_bytes()
    assert draw.main([*words, "a cow --w 64 --h 64 --s 1", "--output", "output/drawn"]) == 1
    assert f"--output {first} exists and is a PNG image" in capsys.readouterr().err and first.read_bytes() == content


def test_a_strength_in_a_prompt_is_that_of_the_adapters(train: Train, tmp_path: Path) -> None:
    model, out = train_adapter(train, "sd", tmp_path)
    words = [model[1], "--adapter", str(out / "mine.safetensors"), "--output", str(tmp_path / "drawn")]
    assert draw.main([*words, "--prompt", f"{PROMPT} --am 0,1", PROMPT]) == 0
    base, full, plain = (pixels(tmp_path / "drawn" / f"{name}_3.png") for name in ("01_0", "02", "03"))
    assert np.abs(base - preview(out, "e000000")).max() <= 1
    assert np.array_equal(full, plain) and np.abs(full - base).max() > 2


@pytest.mark.parametrize("text", ["nan", "inf", "-999", "1e3", "much"])
def test_a_strength_that_is_no_number_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        draw.main(["model", "--prompt", "a", "--strengths", text])
    assert f"'{text}' is no strength; use a number from -100 to 100" in capsys.readouterr().err


def test_several_adapters_add_up_like_a_merged_model(train: Train, tmp_path: Path) -> None:
    model, out = train_adapter(train, "sd", tmp_path / "a")
    _, other = train_adapter(train, "sd", tmp_path / "b", "--seed", "9")
    files = [out / "mine.safetensors", other / "mine.safetensors"]
    merged = tmp_path / "merged.safetensors"
    assert merge_lora.main(
        ["--models", *map(str, files), "--ratios", "0.5", "-0.7", "--save_to", str(merged), "--concat", "--precision",
         "float"]
    ) == 0  # fmt: skip
    both = [f"{files[0]}:0.5", f"{files[1]}:-0.7"]
    images = []
    for number, adapters in enumerate((both, [str(merged)])):
        words = [model[1], "--prompt", PROMPT, "--output", str(tmp_path / str(number)), "--adapter", *adapters]
        assert draw.main(words) == 0
        images.append(pixels(tmp_path / str(number) / "01_3.png"))
    assert np.abs(images[0] - images[1]).max() <= 1
    assert np.abs(images[0] - preview(out, "e000000")).max() > 2


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["{model}"], "there is nothing to draw; give --prompt"),
        (
            ["{model}", "--prompt", "a", "--adapter", "gone.safetensors:0.5"],
            "--adapter gone.safetensors does not exist",
        ),
        (["gone.safetensors", "--prompt", "a"], "gone.safetensors"),
        (["{model}", "--prompt", "a --w none"], "error: --prompt 1: width (--w)"),
        (["{model}", "--prompt", "a --am -1,1", "--strengths", "2"], "--prompt 1: remove strength (--am); --strengths"),
        (["{model}", "--prompts", "gone.txt"], "--prompts is gone.txt, but there is no such file"),
        (["{model}", "--prompt", "a", "--adapter", "{model}/model_index.json:nan"], "the strength is nan"),
        (["{model}", "--prompt", "a", "--blocks_to_swap", "-3"], "--blocks_to_swap is -3; use at least 0"),
    ],
)
def test_invalid_input_ends_with_a_one_line_error(
    words: list[str], error: str, tiny_sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw.main([word.format(model=tiny_sd_folder) for word in words]) == 1
    assert error in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["model", "--prompt", "a", "--seed", "9" * 20], ["--script", "train_network.py", "--seeds", "9" * 20]]
)
def test_a_seed_that_torch_does_not_take_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    tool = draw if "--seed" in words else contact_sheet
    with pytest.raises(SystemExit):
        tool.main(words)
    assert f"'{'9' * 20}' is no seed; use a whole number of at most" in capsys.readouterr().err


def test_a_base_model_in_nf4_can_draw(tiny_sd_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    words = [str(tiny_sd_folder), "--prompt", PROMPT, "--base_format", "nf4", "--output", str(tmp_path)]
    tool = Path(__file__).parents[2] / "tools" / "draw.py"
    # In a new process, where nothing has imported the package yet.
    done = subprocess.run([sys.executable, str(tool), *words], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "01_3.png").is_file(), done.stderr


@pytest.mark.parametrize(
    ("text", "strength"), [("a.safetensors", 1.0), ("a.safetensors:0.5", 0.5), ("a.safetensors:-1", -1.0), ("b:c", 1.0)]
)
def test_the_strength_follows_the_last_colon(
    text: str, strength: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.safetensors").touch()
    (tmp_path / "b:c").touch()
    assert draw.parse_adapter(text, "--adapter")[1] == strength
