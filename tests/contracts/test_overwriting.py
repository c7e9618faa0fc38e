"""No command replaces what it did not write, and every command run twice works twice.

`overwriting.py` lists the calls; a command that is in none of the lists fails the first test.
"""

import importlib
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import load_file, save

from library.checkpoints.headers import read_metadata
from library.training.evaluation import preview
from library.training.reporting.sample_images import image_path
from library.training.saving import checkpoints
from library.training.saving.checkpoints import weights_are_finite
from library.training.saving.state import read_manifest
from tests.contracts.overwriting import CALLS, INPUTS, WITHOUT_TARGET, Call
from tests.hiding import OPTIONAL, hide
from tests.running import ROOT, STARTED, Finished, exit_status, make_images
from tests.tiers import first_is_fast
from tests.tiny.bases import BASES
from tests.tiny.pipelines import build_tiny_pipeline

Train = Callable[..., Finished]
FOLDERS = (".", "tools", "tools/quickstart", "networks", "finetune", "benchmarks", "benchmarks/toys")
SMALL_INPUTS = ("images", "dataset", "table", "prompts", "events", "events_2")  # valid also where nothing may be read
CACHING = {
    "tools/cache_latents.py": "sd",
    "tools/cache_text_encoder_outputs.py": "sdxl",
    **{path.name: path.name.partition("_cache_")[0] for path in ROOT.glob("*_cache_*.py")},
}
TRAINING = {f"{script}.py": script for script in STARTED}
MODEL_OF = {f"{base.script}.py": name for name, base in reversed(BASES.items())}
CASES = [(path, call) for path, calls in CALLS.items() for call in calls]


COMMANDS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for path in (ROOT / folder).glob("*.py")
    if not path.stem.startswith("_")
    and re.search(r"__main__|\nmain = (command|measurement)", path.read_text(encoding="utf-8"))
)


def test_every_command_is_listed() -> None:
    assert {*COMMANDS} == {*CALLS, *WITHOUT_TARGET, *CACHING, *TRAINING}


@pytest.mark.parametrize("path", [path for path in COMMANDS if not path.startswith("benchmarks/")])
def test_an_argument_that_a_command_refuses_does_not_steer_the_terminal(
    path: str, train: Train, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--no_such\x1b[31m", "\u202ename", "\x07"]
    if path in TRAINING:
        done = train(words, TRAINING[path])
    else:
        done = Finished(exit_status(lambda: command_of(path)(words)), *capfd.readouterr())
    said = done.stdout + done.stderr
    assert done.status in (1, 2) and "error" in said.lower()
    assert not {"\x1b", "\x07", "\u202e"} & {*said}


def png() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(content, format="PNG")
    return content.getvalue()


def jpeg() -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(content, format="JPEG")
    return content.getvalue()


def tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("00.txt"))
    return content.getvalue()


def pickled() -> bytes:
    content = io.BytesIO()
    torch.save({"model.diffusion_model.out.weight": torch.ones(2)}, content)
    return content.getvalue()


FOREIGN: dict[str, Callable[[], bytes]] = {
    ".safetensors": lambda: save({"model.diffusion_model.out.weight": torch.ones(2)}, {"ss_output_name": "other"}),
    ".ckpt": pickled,
    ".png": png,
    ".jpg": jpeg,
    ".tar": tar,
    ".html": lambda: b"<!doctype html><title>mine</title>",
    ".json": lambda: b'{"elsewhere": {"caption": "mine"}}',
    ".toml": lambda: b"[general]\n",
    ".txt": lambda: b"a caption of mine",
}
TEXT = b"notes of mine"


def put_foreign(target: Path, content: bytes) -> Path:
    """Write a foreign file, or a foreign folder for a target without an extension. Return the file."""
    path = target if target.suffix else target / "photo.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def fill_in(call: Call, folder: Path, is_read: bool) -> tuple[list[str], Path]:
    """Return the command line and the target. Unless the call `is_read`, base models and adapters are damaged files."""
    names = {"out": folder / "out"}
    for name, write in INPUTS.items():
        if f"{{{name}}}" in call.words:
            is_real = is_read or name in SMALL_INPUTS
            names[name] = write(folder / name) if is_real else folder / f"{name}.safetensors"
            if not is_real:
                names[name].write_bytes(b"damaged")
    return [word.format(**names) for word in call.words.split()], Path(call.target.format(**names))


def command_of(path: str) -> Callable[[list[str]], int]:
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    main: Callable[[list[str]], int] = module.main
    return main


def name_case(value: object) -> str:
    return value if isinstance(value, str) else getattr(value, "target", "").removeprefix("{out}/")


def marks_of(call: Call) -> Any:
    return () if call.tier == "fast" else getattr(pytest.mark, call.tier)


REFUSED = [
    pytest.param(path, call, marks=pytest.mark.slow if call.reads_first or call.tier == "nightly" else ())
    for path, call in CASES
]


@pytest.mark.parametrize(("path", "call"), REFUSED, ids=name_case)
def test_foreign_files_are_refused_before_inputs_are_read(
    path: str, call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, target = fill_in(call, tmp_path, call.reads_first)
    own_kind = FOREIGN.get(target.suffix, png)() if call.foreign is None else call.foreign
    for content in (own_kind, TEXT) if target.suffix else (png(),):
        foreign = put_foreign(target, content)
        assert command_of(path)(words) == 1
        assert f"{target} exists and is" in (error := capsys.readouterr().err) and "would be lost" in error, error
        assert foreign.read_bytes() == content
    assert [file for file in (tmp_path / "out").rglob("*") if file.is_file()] == [foreign]


TWICE = [
    pytest.param(path, call, marks=marks_of(call))
    for path, call in {(path, call.words): (path, call) for path, call in CASES}.values()
]


@pytest.mark.parametrize(("path", "call"), TWICE, ids=name_case)
def test_a_command_run_twice_works_twice_without_optional_packages(
    path: str, call: Call, tmp_path: Path, fresh_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packages are missing at first, and broken in the second run."""
    words, target = fill_in(call, tmp_path, is_read=True)
    optional = set(OPTIONAL) - ({"pyarrow"} if path == "tools/make_shards.py" else set())
    for error in (None, OSError("libcudart.so.9: no such file")):
        with monkeypatch.context() as changes:
            for module in optional:
                hide(module, changes, error)
            assert command_of(path)(words) == 0
        assert target.exists()


def change(target: Path) -> Path:
    """Change the content of a file, or of a file of a folder, as another program would, and return the file."""
    path = next(target.rglob("diffusion_pytorch_model.*")) if target.is_dir() else target
    if path.suffix in (".png", ".jpg"):
        with Image.open(path) as image:
            edited, mark = image.convert("RGB"), image.info
        edited.putpixel((0, 0), tuple(255 - value for value in edited.getpixel((0, 0))))  # type: ignore[union-attr, misc]
        texts = PngInfo()
        for name, value in mark.items():
            if isinstance(value, str):
                texts.add_itxt(name, value)
        edited.save(path, **({"pnginfo": texts} if path.suffix == ".png" else {"comment": mark["comment"]}))
    elif path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        next(tensor for tensor in tensors.values() if tensor.ndim).view(torch.uint8)[..., 0] ^= 1
        path.write_bytes(save(tensors, metadata))
    elif path.suffix == ".ckpt":
        with zipfile.ZipFile(path) as archive:
            comment = archive.comment
        torch.save({"model.diffusion_model.out.weight": torch.ones(2)}, path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = comment
    elif path.suffix == ".json":
        table = json.loads(path.read_text(encoding="utf-8"))
        entry = next(iter(table.values()))
        entry |= {field: "curated" for field in ("caption", "tags") if field in entry}
        path.write_text(json.dumps(table), encoding="utf-8")
    else:
        path.write_bytes(path.read_bytes() + b"\n")
    return path


REBUILT = (".html", ".tar", "-shards.json")  # pages, and shards, which are packed anew with a warning
CHANGED = [
    pytest.param(path, call, marks=marks_of(call))
    for path, call in CASES
    if path.startswith(("tools/", "finetune/", "networks/")) and not call.target.endswith(REBUILT)
]


@pytest.mark.parametrize(("path", "call"), CHANGED, ids=name_case)
def test_what_was_changed_since_it_was_written_is_kept(
    path: str, call: Call, tmp_path: Path, fresh_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words, target = fill_in(call, tmp_path, is_read=True)
    assert command_of(path)(words) == 0
    changed = change(target)
    content = changed.read_bytes()
    assert command_of(path)(words) == 1
    assert f"{target} exists and is" in capsys.readouterr().err and changed.read_bytes() == content


# --- training ---


def training_words(tmp_path: Path, script: str, model: list[str]) -> list[str]:
    words = [
        *model, "--output_dir", str(tmp_path / "out"), "--output_name", "mine", "--max_train_steps", "1",
        "--learning_rate", "1e-3", "--network_dim", "2", "--save_state", "--max_data_loader_n_workers", "0",
    ]  # fmt: skip
    if script.endswith("leco"):
        prompts = tmp_path / "pairs.toml"
        prompts.write_text('[[prompts]]\ntarget = "a red cat"\npositive = "a cat"\n')
        return [*words, "--prompts_file", str(prompts), "--resolution", "64", "--max_denoising_steps", "2"]
    if not (tmp_path / "data").exists():
        make_images(tmp_path / "data" / "1_thing", 2)
    return [*words, "--train_data_dir", str(tmp_path / "data"), "--resolution", "64", "--caption_extension", ".txt"]


def model_of(path: str, folder: Path) -> list[str]:
    """Return the options that select a tiny base model for a script."""
    if path == "diffusers_train_network.py":
        build_tiny_pipeline("AuraFlowPipeline").save_pretrained(folder)
        return ["--pretrained_model_name_or_path", str(folder), "--network_module", "networks.lora"]
    name = {"train_leco.py": "sd", "sdxl_train_leco.py": "sdxl"}.get(path) or MODEL_OF[path]
    return [*BASES[name].build(folder), "--network_module", BASES[name].module]


def put_each_foreign(out: Path) -> Iterator[Path]:
    """Put each thing that a run of this name could replace into a folder, one at a time."""
    for name in ("mine.safetensors", "mine-report.html", "mine-state/photo.png"):
        target = out / name
        yield put_foreign(target, FOREIGN[target.suffix]())
        target.unlink()


TRAINING_PATHS = first_is_fast(sorted(TRAINING, key=lambda path: path != "train_network.py"))


@pytest.mark.parametrize("path", TRAINING_PATHS)
def test_training_refuses_foreign_files_before_the_model_is_read(path: str, train: Train, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"damaged")
    script = TRAINING[path]
    # train_leco.py takes its options from the kind of the base model, so it reads the header of that file.
    is_read = script == "train_leco"
    module = ["--network_module", "networks.lora"]
    model = (
        model_of(path, tmp_path / "model")
        if is_read
        else ["--pretrained_model_name_or_path", str(damaged), "--vae", str(damaged), *module]
    )
    for foreign in put_each_foreign(tmp_path / "out"):
        content = foreign.read_bytes()
        done = train(training_words(tmp_path, script, model), script)
        assert done.status == 1 and "would be lost. Use another name" in done.stderr, done.stderr
        assert foreign.read_bytes() == content
        if foreign.parent.name == "mine-state":
            assert [file.name for file in foreign.parent.iterdir()] == ["photo.png"]


@pytest.mark.parametrize("path", TRAINING_PATHS)
def test_training_twice_works_twice_with_a_warning(path: str, train: Train, tmp_path: Path) -> None:
    words = training_words(tmp_path, TRAINING[path], model_of(path, tmp_path / "model"))
    first, again = (train(words, TRAINING[path]) for _ in range(2))
    assert first.status == 0, first.stderr
    assert again.status == 0 and "mine.safetensors already exists and will be overwritten" in again.stderr, again.stderr
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"mine.safetensors", "mine-state", "mine-report.html"}


# --- caches ---


@pytest.mark.parametrize("path", first_is_fast(CACHING))
def test_caches_are_filled_twice_and_files_that_are_none_are_kept(
    path: str, tmp_path: Path, fresh_process: None, caplog: pytest.LogCaptureFixture
) -> None:
    images = make_images(tmp_path / "data", 2)
    dataset = tmp_path / "data.toml"
    subset = f'[[datasets.subsets]]\nimage_dir = "{images.as_posix()}"\n'
    dataset.write_text(f'[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 64\n{subset}')
    kind = ["--sdxl"] if CACHING[path] == "sdxl" else []
    model = BASES[CACHING[path]].build(tmp_path / "model")
    words = [*model, *kind, "--dataset_config", str(dataset), "--max_data_loader_n_workers", "0"]
    for _ in range(2):
        assert command_of(path)(words) == 0, caplog.text
    caches = [file for file in images.glob("*.npz") if not file.name.startswith(".")]
    assert len(caches) == 2
    for content in (TEXT, png()):
        caches[0].write_bytes(content)
        assert command_of(path)(words) == 1
        assert f"{caches[0]} exists and is" in caplog.text and caches[0].read_bytes() == content


# --- during a run ---


def test_what_appears_during_a_run_is_kept_and_saves_go_beside_it(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, planted = tmp_path / "out", dict[Path, bytes]()

    def plant(target: Path) -> None:
        content = FOREIGN.get(target.suffix, png)()
        planted[put_foreign(target, content)] = content

    def plant_before_saving(module: torch.nn.Module) -> bool:
        if not planted:
            for name in ("mine-step00000001.safetensors", "mine-step00000001-state", "mine.safetensors", "mine-state"):
                plant(out / name)
        return weights_are_finite(module)

    def plant_preview(*arguments: Any) -> Path:
        plant(path := image_path(*arguments))
        return path

    monkeypatch.setattr(checkpoints, "weights_are_finite", plant_before_saving)
    monkeypatch.setattr(preview, "image_path", plant_preview)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    words = [*training_words(tmp_path, "train_network", model_of("train_network.py", tmp_path / "model"))]
    more = ["--max_train_steps", "2", "--save_every_n_steps", "1", "--save_last_n_steps", "0"]
    done = train([*words, *more, "--sample_prompts", str(prompts), "--sample_every_n_steps", "2"]).ok()
    assert len(planted) == 5 and all(path.read_bytes() == content for path, content in planted.items())
    for name in ("mine-step00000001-rescued.safetensors", "mine-rescued.safetensors"):
        assert f"is kept; saving {out / name} instead" in done.stderr
        assert read_metadata(out / name)["ss_output_name"] == "mine"
    for name in ("mine-step00000001-state-rescued", "mine-state-rescued"):
        assert f"is kept; saving {out / name} instead" in done.stderr and read_manifest(out / name)
    (image,) = (out / "sample").glob("*-rescued.png")
    assert f"preview 0: {image}" in done.stderr and Image.open(image).size == (64, 64)
    assert "model saved." in done.stdout and f"the adapter is {out / 'mine-rescued.safetensors'}" in done.stderr


def test_saves_that_another_program_changed_are_moved_aside(train: Train, tmp_path: Path) -> None:
    words = training_words(tmp_path, "train_network", model_of("train_network.py", tmp_path / "model"))
    saved, contents = tmp_path / "out" / "mine.safetensors", []
    for name in ("mine.changed.safetensors", "mine.changed-2.safetensors"):
        assert train(words).status == 0
        contents.append(change(saved).read_bytes())
        done = train(words)
        assert done.status == 0 and f"since it was saved, and is now {saved.with_name(name)}" in done.stderr
        assert {path.read_bytes() for path in saved.parent.glob("mine.changed*")} == set(contents)
        assert saved.exists() and saved.read_bytes() not in contents
    assert train(words).status == 0
    assert len(list(saved.parent.glob("*.safetensors"))) == 3


def test_the_weights_to_start_from_are_refused_as_output_if_there_is_no_state(train: Train, tmp_path: Path) -> None:
    """With --autoresume, the run would otherwise replace the weights that it was told to read."""
    (tmp_path / "out").mkdir()
    weights = tmp_path / "out" / "mine.safetensors"
    metadata = {"ss_network_module": "networks.lora", "ss_output_name": "mine"}
    weights.write_bytes(content := save({"lora_unet_x.alpha": torch.ones(())}, metadata))
    words = training_words(tmp_path, "train_network", ["--pretrained_model_name_or_path", str(tmp_path / "none")])
    words += ["--network_module", "networks.lora", "--network_weights", str(weights), "--autoresume"]
    done = train(words)
    assert done.status == 1 and "is also read by this command and would be lost" in done.stderr
    assert weights.read_bytes() == content
