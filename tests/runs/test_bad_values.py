"""Invalid values that libraries would reject with a traceback end the run with a sentence naming the option."""

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.running import Finished

Train = Callable[..., Finished]


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
