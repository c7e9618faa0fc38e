"""The memory options that musubi-tuner's pages name run on every base model that shares its dialect.

Paragraphs of docs/flux_2.md, krea2.md, qwen_image_21.md and zimage.md about memory, and of docs/block_swap.md. Z-Image
alone has a tiny model of more blocks than have to stay on the GPU.
"""

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from library.training.command_line.cli import parse
from tests.running import Finished, small_run
from tests.runs.musubi_tuner import paths_of, run_command
from tests.tiny.bases import BASES

FP8 = "--fp8_base --fp8_scaled"
OFFLOADING = "--gradient_checkpointing --gradient_checkpointing_cpu_offload"
SHARED = "--img_in_txt_in_offloading --disable_numpy_memmap --split_attn"
SWAP = "--blocks_to_swap 1 --block_swap_h2d_only --block_swap_ring_size 1 --use_pinned_memory_for_block_swap"
CASES = [
    ("qwen_image_21", "cache_latents", "--vae_tiling"),
    ("qwen_image_21", "cache_text_encoder_outputs", "--fp8_vl"),
    ("qwen_image_21", "cache_text_encoder_outputs", "--device cpu --text_encoder_dtype float32"),
    ("qwen_image_21", "train_network", f"{FP8} --fp8_vl {OFFLOADING} {SHARED}"),
    ("flux_2", "cache_text_encoder_outputs", "--fp8_text_encoder"),
    ("flux_2", "train_network", f"{FP8} --fp8_text_encoder {OFFLOADING} {SHARED}"),
    ("krea2", "train_network", f"{FP8} {OFFLOADING} {SHARED}"),
    ("zimage", "cache_text_encoder_outputs", "--fp8_llm"),
    ("zimage", "train_network", f"{FP8} --fp8_llm {OFFLOADING} {SHARED}"),
    ("zimage", "train_network", f"{FP8} {OFFLOADING} {SWAP}"),
]
# What these save happens here in any case, or is not needed; a line of the log says so.
NO_EFFECT = {
    "img_in_txt_in_offloading",
    "disable_numpy_memmap",
    "split_attn",
    "block_swap_h2d_only",
    "use_pinned_memory_for_block_swap",
}


@pytest.mark.parametrize(
    ("name", "command", "words"), [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])]
)
def test_a_paragraph_about_memory_runs(
    name: str, command: str, words: str, train: Callable[..., Finished], tmp_path: Path
) -> None:
    base = BASES[name]
    assert base.dit is not None
    release = next(iter(base.dit.trained))
    model = base.dit.trained[release](tmp_path / "model")
    version = ["--model_version", release] if release else []
    paths = paths_of(model, tmp_path)
    if command == "train_network":
        run = small_run(tmp_path, tmp_path, base.module, "1")
        run[run.index("--train_data_dir") : run.index("--caption_extension")] = ["--dataset_config", paths["data"]]
        done = train([*model, *run, "--mixed_precision", "bf16", *version, *words.split()], base.script)
        assert done.status == 0 and (tmp_path / "out" / "mine.safetensors").is_file(), done.stderr
        log = done.stderr
    else:
        part = "--vae {vae}" if "latents" in command else "--text_encoder {text}"
        log = run_command(f"{name}_{command}", f"--dataset_config {{data}} {part} {' '.join(version)} {words}", paths)
        assert len(list((tmp_path / "cache").rglob("*.npz"))) >= 3
    flags = {word.removeprefix("--") for word in words.split() if word.startswith("--")}
    assert set(re.findall(r"--(\w+) has no effect", log)) & flags == flags & NO_EFFECT


def test_the_old_name_on_the_page_of_flux_2_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(import_module(BASES["flux_2"].script).setup_parser(), ["--fp8_t5"])
    assert "unrecognized arguments: --fp8_t5 (use --fp8_text_encoder)" in capsys.readouterr().err
