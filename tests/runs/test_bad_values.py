"""Invalid values that libraries would reject with a traceback end the run with a sentence naming the option."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.running import Finished

Train = Callable[..., Finished]

VALUES = [
    (["--vae=-x"], ("--vae -x",)),
    (["--network_module", ".."], ("--network_module .. is no name of a module",)),
    (["--optimizer_args", "betas=(0.9,)"], ("--optimizer_args", "betas=(0.9,)")),
    (["--lr_scheduler_type", "StepLR", "--lr_scheduler_args", "step_size=0"], ("StepLR", "step_size=0")),
    (["--lr_scheduler_type", "CosineAnnealingLR", "--lr_scheduler_args", "T_max=0"], ("CosineAnnealingLR", "T_max=0")),
    (["--noise_offset", "1e308"], ("--noise_offset is 1e+308; use at most 100",)),
    (["--ddp_timeout", "99999999999999"], ("--ddp_timeout is 99999999999999; use at most",)),
    (["--token_warmup_step", "nan"], ("--token_warmup_step is nan",)),
    (
        ["--enable_bucket", "--max_bucket_reso", str(2**63)],
        ("--max_bucket_reso is 9223372036854775808; use a number below 2^63",),
    ),
]


@pytest.mark.parametrize(("words", "named"), VALUES, ids=lambda value: str(value))
def test_an_invalid_value_is_named_before_anything_is_written(
    train: Train, base_arguments: list[str], tmp_path: Path, words: list[str], named: tuple[str, ...]
) -> None:
    done = train([*base_arguments, "--max_train_steps", "1", *words])
    assert done.status == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(word in done.stderr for word in named), done.stderr
    assert not list(tmp_path.rglob("mine*"))


def test_logs_that_cannot_be_written_do_not_end_a_run(train: Train, base_arguments: list[str], tmp_path: Path) -> None:
    done = train([*base_arguments, "--max_train_steps", "1", "--logging_dir", "/proc/x"])
    assert done.status == 0 and "--logging_dir /proc/x: charts are off" in done.stderr
    assert (tmp_path / "out" / "mine.safetensors").exists()


def test_a_damaged_tokenizer_is_named(
    train: Train, base_arguments: list[str], tiny_sd_folder: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_sd_folder, tmp_path / "model")
    for file in (model / "tokenizer").glob("*.json"):
        if file.name in ("vocab.json", "tokenizer.json"):
            file.write_text("{broken")
    done = train([str(model) if word == str(tiny_sd_folder) else word for word in base_arguments])
    assert done.status == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"the tokenizer {model / 'tokenizer'} cannot be read" in done.stderr
