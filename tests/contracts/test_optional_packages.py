"""Every command asks for the optional packages of its options before it reads a model or an image.

The base model is a damaged file, which a command that reads it first would name. What every run needs is asked for
when a script starts, see test_missing_packages.py.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.registry import _registry

from tests.contracts.test_overwriting import command_of
from tests.hiding import hide
from tests.running import STARTED, Finished, make_images
from tests.tiers import first_is_fast

Train = Callable[..., Finished]
# Module -> the options that need it, and the sentence.
OPTIONS: dict[str, tuple[str, str]] = {
    "wandb": ("--log_with wandb", "--log_with wandb needs the package: pip install wandb"),
    "tensorboard": ("--logging_dir {out}", "--log_with tensorboard needs the package: pip install tensorboard"),
    "bitsandbytes.optim": (
        "--optimizer_type AdamW8bit",
        "--optimizer_type AdamW8bit needs the library bitsandbytes: pip install bits",
    ),
    "bitsandbytes": ("--base_format nf4", "--base_format nf4 needs the library bitsandbytes, which is not installed"),
    "prodigyopt": ("--optimizer_type Prodigy", "needs the library prodigyopt: pip install prodigyopt"),
    "schedulefree": ("--optimizer_type AdamWScheduleFree", "needs the library schedulefree: pip install schedulefree"),
    "dadaptation": ("--optimizer_type DAdaptAdam", "needs the library dadaptation: pip install dadaptation"),
    "lion_pytorch": ("--optimizer_type Lion", "needs the library lion_pytorch: pip install lion-pytorch"),
    "came_pytorch": ("--optimizer_type came_pytorch.CAME", "needs the library came_pytorch: pip install came-pytorch"),
    "users_rates": ("--lr_scheduler_type users_rates.Wave", "--lr_scheduler_type users_rates.Wave needs the library"),
    "users_images": ("--dataset_class users_images.All", "--dataset_class users_images.All needs the library users_im"),
    "lycoris": ("--network_module lycoris.kohya", "--network_module lycoris.kohya"),
}
TOOLS = {
    "tools/choose_checkpoint.py": "--script train_network.py --files {base}",
    "tools/contact_sheet.py": "--script train_network.py --files {base} --sample_prompts {prompts}",
}
DATA = {
    "pyarrow": ('parquet = "{folder}/a.parquet"', "shards and parquet require the package pyarrow: python3 -m pip"),
    "s3fs": ('shards = "s3://bucket/a.tar"', "s3:// requires the package s3fs: python3 -m pip install s3fs"),
}


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


# train_leco.py reads the header of the base model first, which chooses the script; then it does as the others.
@pytest.mark.parametrize(
    "script", first_is_fast(["train_network", *sorted({*STARTED} - {"train_network", "train_leco"})])
)
@pytest.mark.parametrize("module", OPTIONS)
def test_a_training_names_the_package_before_it_reads_the_base_model(
    script: str, module: str, words: list[str], tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(module.partition(".")[0], monkeypatch)
    options, sentence = OPTIONS[module]
    more = options.format(out=tmp_path / "logs").split()
    network = [] if "--network_module" in more else ["--network_module", "networks.lora"]
    (tmp_path / "prompts.toml").write_text('[[prompts]]\ntarget = "cat"\n')
    leco = ["--prompts_file", str(tmp_path / "prompts.toml")] if script.endswith("leco") else []
    done = train([*words, *network, *more, *leco], script)
    assert done.status == 1 and sentence in " ".join(done.stderr.split()), done.stderr[-2000:]
    assert not (tmp_path / "out").exists() and not (tmp_path / "logs").exists()


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_names_the_package_before_it_reads_the_base_model(
    tool: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide("bitsandbytes", monkeypatch)
    (tmp_path / "prompts.txt").write_text("a cat")
    named = TOOLS[tool].format(base=tmp_path / "base.safetensors", prompts=tmp_path / "prompts.txt")
    before = sorted(tmp_path.rglob("*"))
    assert command_of(tool)([*named.split(), *words, "--base_format", "nf4"]) == 1
    assert OPTIONS["bitsandbytes"][1] in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("package", DATA)
@pytest.mark.parametrize("command", ["train_network.py", "tools/cache_latents.py", "tools/make_shards.py"])
def test_a_source_of_images_names_its_package_before_any_other_is_read(
    package: str,
    command: str,
    tiny_sd_folder: Path,
    tmp_path: Path,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The first source is a damaged image, which listing would report."""
    hide(package, monkeypatch)
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
    assert status == 1 and DATA[package][1] in " ".join(printed.split()), printed[-2000:]
    assert "00.png" not in printed and sorted(tmp_path.rglob("*")) == before


def test_a_broken_wandb_is_named_before_the_base_model_is_read(
    words: list[str], tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken" / "wandb").mkdir(parents=True)
    (tmp_path / "broken" / "wandb" / "__init__.py").write_text("raise AttributeError('np.float_ was removed')")
    monkeypatch.syspath_prepend(str(tmp_path / "broken"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    for more in (["--log_with", "wandb"], ["--log_with", "all", "--logging_dir", str(tmp_path / "logs")]):
        done = train([*words, "--network_module", "networks.lora", *more])
        printed = " ".join(done.stderr.split())
        assert done.status == 1 and "cannot be imported (AttributeError: np.float_ was removed)" in printed, printed
        assert f"{more[0]} {more[1]}: wandb" in printed and "pip install --upgrade wandb" in printed
        assert "this is a bug" not in printed and not (tmp_path / "out").exists()
