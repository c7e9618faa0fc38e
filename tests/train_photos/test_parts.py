"""The files of a base model besides its denoiser, found by what errors say in their fields, whatever their words."""

import random
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from library.base.errors import NotThere, UserError, about, of_file
from library.train_photos.base import recognise
from library.train_photos.parts import find_parts, is_accepted
from tests.tiny.bases import BASES
from tests.tiny.sd3 import build_tiny_sd3

BASE_FLAG = "--pretrained_model_name_or_path"
SNAPSHOT = "models--stabilityai--vae--clip_l/snapshots/0a1b2c"  # a folder of the hub's cache, with options in its name
WORDS = ("--vae", "--clip_l", "no", "missing", "/models/x.safetensors", "that", "does not exist", ";", "use", "--t5xxl")


@pytest.fixture(params=["as written", "nonsense"])
def wording(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as it is, and once with every message of a UserError replaced by other words."""
    if request.param == "as written":
        return
    init: Callable[..., None] = UserError.__init__
    rng = random.Random(5)

    def init_with_nonsense(self: UserError, message: str, remedy: str | None = None, **fields: Any) -> None:
        init(self, " ".join(rng.choices(WORDS, k=12)), **fields)

    monkeypatch.setattr(UserError, "__init__", init_with_nonsense)


def place_parts(name: str, root: Path) -> tuple[Path, dict[str, str]]:
    """Write a tiny base below a snapshot of the hub, and its parts in ComfyUI's folders under names that mislead.

    Return the base's file, and the names of the parts by flag.
    """
    if name == "sd3":  # the one that names its parts in no option unless its file lacks them
        files = {f"--{part}": root / f"{part}.safetensors" for part in ("clip_l", "clip_g")}
        files[BASE_FLAG] = build_tiny_sd3(root, 5, with_text=False)
    else:
        words = BASES[name].build(root)
        files = {flag: Path(path) for flag, path in zip(words[::2], words[1::2], strict=True) if Path(path).is_file()}
    target = root / SNAPSHOT
    target.mkdir(parents=True)
    names = {}
    for number, (flag, path) in enumerate(sorted(files.items())):
        if flag == BASE_FLAG:
            continue
        folder = target / ("vae" if "vae" in flag or flag == "--ae" else "text_encoders")
        folder.mkdir(exist_ok=True)
        # Only their names tell CLIP-L from CLIP-G before both are there.
        names[flag.removeprefix("--")] = f"{path.stem if name == 'sd3' else 'model' * (number % 2)}{number}.safetensors"
        path.rename(folder / names[flag.removeprefix("--")])
    for folder, content in (("text_encoders", b"\x10\0\0\0\0\0\0\0{"), ("vae", b"<!doctype html>")):
        (target / folder).mkdir(exist_ok=True)
        (target / folder / "a broken download.safetensors").write_bytes(content)
    save_file({"weight": torch.zeros(2)}, target / "vae" / "another model.safetensors")
    for tokenizer in root.glob("tokenizer*"):
        tokenizer.rename(target / tokenizer.name)
    return files[BASE_FLAG].rename(target / "base.safetensors"), names


@pytest.mark.parametrize("name", ["sd3", "flux", "lumina", "zimage", "krea2", "hunyuan_image", "qwen_image_21"])
def test_parts_are_found_whatever_errors_say(name: str, tmp_path: Path, wording: None) -> None:
    path, names = place_parts(name, tmp_path)
    base = recognise(str(path))
    parser = import_module(base.spec.script.removesuffix(".py")).setup_parser()
    options = base.spec.options.from_args(parser.parse_args([BASE_FLAG, str(path)]))
    found = find_parts(base, options, None)
    assert {flag: Path(file).name for flag, file in found.items()} == names


def test_a_part_that_is_nowhere_is_named(tmp_path: Path, wording: None) -> None:
    path, names = place_parts("sd3", tmp_path)
    (path.parent / "text_encoders" / names["clip_g"]).unlink()
    base = recognise(str(path))
    options = base.spec.options.from_args(
        import_module("sd3_train_network").setup_parser().parse_args([BASE_FLAG, str(path)])
    )
    with pytest.raises(UserError) as error:
        find_parts(base, options, None)
    assert (error.value.setting, error.value.cause) == ("--clip_g", "missing")


@pytest.mark.parametrize(
    ("error", "accepted"),
    [
        (about("--vae")("is wrong"), False),
        (about("--clip_l", others=["--vae"])("does not fit"), False),
        (of_file("/models/vae/a.safetensors")("is damaged"), False),
        (of_file("/models/vae/a.safetensors/config.json")("is damaged"), False),
        (of_file("/models/text_encoders/b.safetensors")("is damaged"), True),
        (about("--clip_l", kind=NotThere)("is missing"), True),
        (UserError("something, somewhere"), False),
    ],
)
def test_a_file_is_refused_by_errors_about_it_and_by_those_of_unknown_cause(error: UserError, accepted: bool) -> None:
    def build(more: object) -> None:
        raise error

    assert is_accepted(build, "vae", Path("/models/vae/a.safetensors")) == accepted
