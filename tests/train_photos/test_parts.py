"""The files of a base model besides its denoiser, and cuts of photos."""

import json
import random
import re
import signal
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import toml
import torch
from safetensors.torch import load_file, save_file

import train
from library.base.errors import NotThere, UserError, about, of_file
from library.train_photos.base import recognise
from library.train_photos.parts import find_parts, is_accepted
from tests.contracts.other_trainers import find_example
from tests.killing import FRONT_DOOR, Ended, Job, run_jobs
from tests.running import fresh_process, make_images  # noqa: F401
from tests.tiny.bases import BASES
from tests.tiny.sd3 import build_tiny_sd3
from tests.train_photos.test_train import build_base, write_turned
from tools.quickstart.toy_world import QUICKSTART

BASE_FLAG = "--pretrained_model_name_or_path"
SNAPSHOT = "models--stabilityai--vae--clip_l/snapshots/0a1b2c"  # a folder of the hub's cache, with options in its name
ERROR_WORDS = (
    "--vae",
    "--clip_l",
    "no",
    "missing",
    "/models/x.safetensors",
    "that",
    "does not exist",
    ";",
    "use",
    "--t5xxl",
)


@pytest.fixture(params=["as written", "nonsense"])
def wording(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as it is, and once with every message of a UserError replaced by other words."""
    if request.param == "as written":
        return
    init: Callable[..., None] = UserError.__init__
    rng = random.Random(5)

    def init_with_nonsense(self: UserError, message: str, remedy: str | None = None, **fields: Any) -> None:
        init(self, " ".join(rng.choices(ERROR_WORDS, k=12)), **fields)

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


# train.py killed at any file operation: the same command line goes on, and nothing that is whole is replaced.

OWN = re.compile(
    r"mine\.toml|mine-dataset|mine-prompts|strengths|timed|\.lock| \.?mine\.safetensors| mine-state|^mkdir out"
)
"""The files of train.py itself, and those that decide what it does next."""
NUM_PARTS = 15  # each of a few cuts, which take minutes


def start(folder: Path) -> Path:
    (folder / "photos").mkdir(parents=True)
    write_turned(folder / "photos")
    return folder


def outcome(folder: Path, before: str, again: Ended) -> str:
    """Return what the second call did, judged by its words and files."""
    said = [
        line for line in again.output.splitlines() if line.startswith(("an unfinished run is there", "mine is fin"))
    ]
    what = re.sub(r"\d+ of", "N of", said[0]) if said else "a new run"
    return f"{what} (cut at {before.split()[0]})" if not said else what


def cut_at(points: list[tuple[int, bool]], arguments: list[str], whole: Path, tmp_path: Path) -> Counter[str]:
    """Kill runs at these operations, and give the same command again. Return what that did, counted."""
    jobs = []
    for number, is_half in points:
        at = str(start(tmp_path / f"{number}{'-half' * is_half}"))
        jobs.append(Job(arguments, at, FRONT_DOOR, dies_at=number, leaves_half=is_half))
        jobs.append(Job(arguments, at, FRONT_DOOR))
    results = run_jobs(jobs, tmp_path, timeout=7200)
    expected, outcomes = load_file(whole / "out" / "mine.safetensors"), Counter[str]()
    for job, killed, again in zip(jobs[::2], results[::2], results[1::2], strict=True):
        point, out = f"at {killed.operations[-1]}", Path(job.folder) / "out"
        # A later run has a few operations less than the first, and may have ended before the last numbers.
        assert killed.status in (-signal.SIGKILL, 0), point
        assert again.status == 0, f"{point}: {again.output}"
        saved = load_file(out / "mine.safetensors")
        assert saved.keys() == expected.keys() and all(saved[name].equal(expected[name]) for name in saved), point
        assert (out / "mine-strengths" / "strengths.png").is_file(), point
        is_new = "mine is finished and stays" in again.output
        assert (out / "mine-2.safetensors").exists() == is_new, point
        assert not [path.name for path in out.iterdir() if "timed" in path.name or "unfinished" in path.name], point
        outcomes[outcome(out, killed.operations[-1], again)] += 1
    return outcomes


@pytest.mark.nightly
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_train_py_killed_at_every_file_operation_of_its_own_goes_on(part: int, tmp_path: Path) -> None:
    base = build_base("sd3", tmp_path / "base")
    words = ["photos", "--base", base, "--trigger", "mycat, a cat", "--steps", "3", "--name", "mine", "--output_dir"]
    arguments = [*words, "out", "--seed", "5", "--save_every_n_minutes", "1e-9", "--yes"]
    whole = start(tmp_path / "whole")
    (undisturbed,) = run_jobs([Job(arguments, str(whole), FRONT_DOOR)], tmp_path)
    assert undisturbed.status == 0, undisturbed.output
    operations = undisturbed.operations
    points = [(number, False) for number, line in enumerate(operations) if OWN.search(line)]
    points += [(number, True) for number, line in enumerate(operations) if line.startswith("save ")]
    points = points[part::NUM_PARTS]
    outcomes = cut_at(points, arguments, whole, tmp_path)
    print("\n".join(f"{count:4}  {what}" for what, count in outcomes.most_common()))
    assert points and sum(outcomes.values()) == len(points)


# train.py --like: a LoRA or a configuration of another trainer decides how photos are trained.

TOY_BASE = QUICKSTART / "toy_base"
RANK, ALPHA = 4, 8


def save_lora_of_diffusers(folder: Path) -> Path:
    """Save a LoRA of the toy base with diffusers and PEFT, in their names and with their metadata."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft import LoraConfig, get_peft_model_state_dict

    unet = UNet2DConditionModel.from_pretrained(TOY_BASE / "unet")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    torch.manual_seed(0)
    unet.add_adapter(config)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    layers = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata=config.to_dict(), safe_serialization=True
    )
    path = folder / "pytorch_lora_weights.safetensors"
    assert LORA_ADAPTER_METADATA_KEY in json.dumps(train_metadata(path))
    return path


def train_metadata(path: Path) -> dict[str, str]:
    from library.checkpoints.headers import read_metadata

    return dict(read_metadata(path))


@pytest.mark.slow
def test_a_lora_of_diffusers_goes_on_with_the_photos_of_the_quickstart(
    tmp_path: Path,
    fresh_process: None,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    theirs, out = save_lora_of_diffusers(tmp_path), tmp_path / "out"
    status = train.main([
        str(QUICKSTART / "dataset"), "--base", str(TOY_BASE), "--trigger", "heart", "--like", str(theirs), "--steps",
        "2", "--output_dir", str(out), "--name", "mine", "--yes",
    ])  # fmt: skip
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert f"like {theirs.name}" in printed and "network_dim 4" in printed and "it goes on from its weights" in printed
    mine, before = load_file(out / "mine.safetensors"), load_file(theirs)
    downs = [key for key in mine if key.endswith("attn1_to_q.lora_down.weight")]
    assert len(downs) > 2 and {mine[key].shape[0] for key in downs} == {RANK}
    assert {float(mine[key.replace("lora_down.weight", "alpha")]) for key in downs} == {float(ALPHA)}
    starts = [value for key, value in before.items() if "lora_A" in key or "lora.down" in key]
    nearest = [min(float(torch.dist(m, s) / s.norm()) for m in mine.values() if m.shape == s.shape) for s in starts]
    assert len(starts) > 8 and max(nearest) < 0.2  # two steps move the weights of their start only a little


def test_a_configuration_decides_all_but_length_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_images(tmp_path / "photos", 4)
    file = find_example("Nerogar/OneTrainer", "sd 1.5 LoRA").write(tmp_path)
    out = tmp_path / "out"
    words = [str(images), "--base", str(TOY_BASE), "--trigger", "heart", "--output_dir", str(out), "--name", "mine"]
    assert train.main([*words, "--like", str(file), "--plan_only"]) == 0
    values = toml.loads((out / "mine.toml").read_text(encoding="utf-8"))
    taken = {"network_dim": 16, "network_alpha": 1.0, "learning_rate": 3e-4, "lr_scheduler": "constant_with_warmup",
             "optimizer_type": "AdamW", "train_batch_size": 4}  # fmt: skip
    assert {name: values[name] for name in taken} == taken
    assert "unet_lr" not in values and "optimizer_args" not in values  # the recipe's, for another optimizer
    assert "like config.json" in capsys.readouterr().out and values["max_train_steps"] > 0


def test_a_file_for_another_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = make_images(tmp_path / "photos", 4)
    words = [str(images), "--base", str(TOY_BASE), "--trigger", "heart", "--yes", "--output_dir", str(tmp_path / "out")]
    file = find_example("ostris/ai-toolkit", "lora_flux_24gb").write(tmp_path)
    assert train.main([*words, "--like", str(file)]) == 1
    assert "is for flux_train_network.py" in capsys.readouterr().err
    (tmp_path / "poem.txt").write_text("roses are red")
    assert train.main([*words, "--like", str(tmp_path / "poem.txt")]) == 1
    assert "is neither a LoRA nor a configuration" in capsys.readouterr().err
