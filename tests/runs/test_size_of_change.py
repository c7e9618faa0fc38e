"""The size of an adapter's change: in the last line of a run, and by tools/check_lora_weights.py."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.running import Finished
from tools.check_lora_weights import main

Train = Callable[..., Finished]


def size_in(text: str) -> float:
    """Return the size that the last line of a text gives, in percent."""
    (size,) = re.findall(r"it changes the adapted weights by ([\d.]+)%: ", text.strip().splitlines()[-1])
    return float(size)


@pytest.mark.parametrize(
    "options",
    [
        ["--network_module", "networks.lora", "--ema_decay", "0.9"],
        ["--network_module", "networks.lora", "--network_args", "dora_wd=True", "conv_dim=4"],
        ["--network_module", "networks.lokr", "--network_args", "factor=2"],
        ["--network_module", "networks.oft"],
        ["--network_module", "networks.lora", "--base_format", "int8", "--blocks_to_swap", "2"],
    ],
    ids=lambda options: " ".join(options[1:]),
)
def test_the_last_line_and_the_tool_agree(
    train: Train, base_arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str]
) -> None:
    done = train([*base_arguments, "--network_train_unet_only", *options])
    assert done.status == 0, done.stderr
    base = base_arguments[base_arguments.index("--pretrained_model_name_or_path") + 1]
    file = str(tmp_path / "out" / "mine.safetensors")
    assert main([file, "--base_model", base]) == 0
    size = size_in(capfd.readouterr().out)
    assert 0 < size == pytest.approx(size_in(done.stderr), rel=0.02, abs=0.006)
    assert main([file, "--base_model", base, "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["relative_change"] == pytest.approx(size / 100, abs=6e-5)
    assert report["num_compared"] == len(report["modules"])


def test_a_word_of_all_prompts_that_no_caption_has_is_warned_of(
    train: Train, base_arguments: list[str], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a zxqcat on grass --w 64 --h 64 --s 1\na sitting zxqcat --w 64 --h 64 --s 1\n")
    arguments = [*base_arguments, "--max_train_steps", "1", "--sample_prompts", str(prompts), "--sample_at_first"]
    done = train([*arguments, "--network_dim", "32"])
    assert done.status == 0, done.stderr
    assert "--sample_prompts: every prompt has 'zxqcat', and no caption, caption_prefix or class_tokens" in done.stderr
    assert "--network_alpha is 1 (its default), so the adapter of --network_dim 32 acts at 1/32" in done.stderr
    prompts.write_text(prompts.read_text().replace("zxqcat", "cat"))
    assert "every prompt has" not in train(arguments).stderr
