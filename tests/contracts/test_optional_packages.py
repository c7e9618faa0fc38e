"""Every command asks for the optional packages of its options before it reads a model or an image.

The base model is a damaged file, which a command that reads it first would name. What every run needs is asked for
when a script starts, see test_missing_packages.py.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.registry import _registry

from tests.contracts.test_overwriting import command_of
from tests.hiding import OPTIONAL, hide
from tests.running import STARTED, Finished, make_images

Train = Callable[..., Finished]
# Module -> the options that need it, and pip's name of its package.
OPTIONS: dict[str, tuple[str, str]] = {
    "wandb": ("--log_with wandb", "wandb"),
    "tensorboard": ("--log_with tensorboard --logging_dir {out}", "tensorboard"),
    "bitsandbytes.optim": ("--optimizer_type AdamW8bit", "bitsandbytes"),
    "bitsandbytes": ("--base_format nf4", "bitsandbytes"),
    "prodigyopt": ("--optimizer_type Prodigy", "prodigyopt"),
    "schedulefree": ("--optimizer_type AdamWScheduleFree", "schedulefree"),
    "dadaptation": ("--optimizer_type DAdaptAdam", "dadaptation"),
    "lion_pytorch": ("--optimizer_type Lion", "lion-pytorch"),
    "came_pytorch": ("--optimizer_type came_pytorch.CAME", "came-pytorch"),
    "users_rates": ("--lr_scheduler_type users_rates.Wave", "users-rates"),
    "users_images": ("--dataset_class users_images.All", "users-images"),
    "lycoris": ("--network_module lycoris.kohya", "lycoris-lora"),
}
TOOLS = {
    "tools/choose_checkpoint.py": "--script train_network.py --files {base}",
    "tools/contact_sheet.py": "--script train_network.py --files {base} --sample_prompts {prompts}",
}
DATA = {
    "pyarrow": ('parquet = "{folder}/a.parquet"', "parquet (and shards)"),
    "s3fs": ('shards = "s3://bucket/a.tar"', "s3://"),
}
BROKEN = (OSError("libcudart.so.9: no such file"), RuntimeError("CUDA setup failed"), AttributeError("np.float_"))
STATES = [None, *BROKEN]  # None: missing


def sentences(package: str, error: Exception | None) -> tuple[str, str]:
    """Return what a message says of a package that is missing, or raises `error` when it is imported, and pip's
    command."""
    if error is None:
        return package, f"pip install {package}"
    return f" cannot be imported ({type(error).__name__}: {error})", f"pip install --upgrade {package}"


WORK_WITHOUT = {"pillow_heif", "pynvml", "xformers"}


def test_every_optional_package_has_a_case() -> None:
    assert {*OPTIONAL} == {module.partition(".")[0] for module in OPTIONS} & {*OPTIONAL} | {"pyarrow"} | WORK_WITHOUT


@pytest.mark.parametrize("error", STATES[:2])
def test_a_training_that_asks_for_no_package_works_without_all(
    error: Exception | None, base_arguments: list[str], train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in OPTIONAL:
        hide(module, monkeypatch, error)
    done = train([*base_arguments, "--max_train_steps", "1", "--xformers"])
    assert done.status == 0, done.stderr
    assert (
        "using torch's scaled dot product attention" in done.stderr and sentences("xformers", error)[1] in done.stderr
    )


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The options of a training whose base model cannot be read."""
    (tmp_path / "base.safetensors").write_bytes(b"damaged")
    make_images(tmp_path / "images" / "2_cat", 1)
    return [
        "--pretrained_model_name_or_path",
        str(tmp_path / "base.safetensors"),
        "--train_data_dir",
        str(tmp_path / "images"),
        "--output_dir",
        str(tmp_path / "out"),
        "--output_name",
        "mine",
        "--max_train_steps",
        "1",
        "--resolution",
        "64",
    ]


# train_leco.py and tools/draw.py read the header of the base model first, which chooses the script; then they do as
# the others.
SCRIPTS = ["train_network", *sorted({*STARTED} - {"train_network", "train_leco"})]
CASES = [
    *((script, module, None) for script in SCRIPTS for module in OPTIONS),
    *(("train_network", module, error) for module, error in zip(OPTIONS, BROKEN * len(OPTIONS), strict=False)),
]


@pytest.mark.parametrize(
    ("script", "module", "error"),
    [pytest.param(*case, marks=() if case[0] == "train_network" else pytest.mark.slow) for case in CASES],
)
def test_a_training_names_the_package_before_it_reads_the_base_model(
    script: str,
    module: str,
    error: Exception | None,
    words: list[str],
    tmp_path: Path,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hide(module.partition(".")[0], monkeypatch, error)
    options, package = OPTIONS[module]
    more = options.format(out=tmp_path / "logs").split()
    network = [] if "--network_module" in more else ["--network_module", "networks.lora"]
    (tmp_path / "prompts.toml").write_text('[[prompts]]\ntarget = "cat"\n')
    leco = ["--prompts_file", str(tmp_path / "prompts.toml")] if script.endswith("leco") else []
    done = train([*words, *network, *more, *leco], script)
    printed = " ".join(done.stderr.split())
    assert done.status == 1 and " ".join(more[:2]) in printed and "this is a bug" not in printed, printed
    assert all(sentence in printed for sentence in sentences(package, error)), printed
    assert not (tmp_path / "out").exists() and not (tmp_path / "logs").exists()


@pytest.mark.parametrize("error", STATES)
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_names_the_package_before_it_reads_the_base_model(
    tool: str,
    error: Exception | None,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hide("bitsandbytes", monkeypatch, error)
    (tmp_path / "prompts.txt").write_text("a cat")
    named = TOOLS[tool].format(base=tmp_path / "base.safetensors", prompts=tmp_path / "prompts.txt")
    before = sorted(tmp_path.rglob("*"))
    assert command_of(tool)([*named.split(), *words, "--base_format", "nf4"]) == 1
    printed = capsys.readouterr().err
    assert all(sentence in printed for sentence in ("--base_format nf4", *sentences("bitsandbytes", error))), printed
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("error", STATES[:2])
@pytest.mark.parametrize("package", DATA)
@pytest.mark.parametrize("command", ["train_network.py", "tools/cache_latents.py", "tools/make_shards.py"])
def test_a_source_of_images_names_its_package_before_any_other_is_read(
    package: str,
    error: Exception | None,
    command: str,
    tiny_sd_folder: Path,
    tmp_path: Path,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The first source is a damaged image, which listing would report."""
    hide(package, monkeypatch, error)
    monkeypatch.delitem(_registry, "s3", raising=False)  # the class, which another test may have used
    folder = make_images(tmp_path / "images", 1)
    (folder / "00.png").write_bytes(b"damaged")
    subsets = (f'image_dir = "{folder.as_posix()}"', DATA[package][0].format(folder=tmp_path.as_posix()))
    config = tmp_path / "dataset.toml"
    text = "".join(f"[[datasets.subsets]]\n{subset}\n" for subset in subsets)
    config.write_text(f"[[datasets]]\nresolution = 64\n{text}")
    words = ["--dataset_config", str(config), "--cache_dir", str(tmp_path / "cache")]
    model = ["--pretrained_model_name_or_path", str(tiny_sd_folder), "--output_dir", str(tmp_path / "out")]
    before = sorted(tmp_path.rglob("*"))
    if command == "train_network.py":
        network = ["--output_name", "mine", "--network_module", "networks.lora", "--max_train_steps", "1"]
        status = (done := train([*words, *model, *network])).status
        printed = done.stderr
    else:
        status = command_of(command)([*words, *(model if "cache" in command else ["--out", str(tmp_path / "shards")])])
        printed = capfd.readouterr().err
    said = " ".join(printed.split())
    assert status == 1 and all(sentence in said for sentence in (DATA[package][1], *sentences(package, error))), said
    assert "00.png" not in printed and sorted(tmp_path.rglob("*")) == before
