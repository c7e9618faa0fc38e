"""musubi-tuner's options, from a command line or a config file, stand for ours."""

from pathlib import Path
from typing import Any

import pytest

import zimage_train_network
from library.architectures.zimage.options import ZImageOptions
from library.options.no_effect import find_unused
from library.training.command_line.cli import parse

CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"gradient_checkpointing_cpu_offload": True}, {"cpu_offload_checkpointing": True}),
    ({"vae_dtype": "float32", "mixed_precision": "bf16"}, {"no_half_vae": True}),
    ({"vae_dtype": "bfloat16", "text_encoder_dtype": "bf16", "mixed_precision": "bf16"}, {"no_half_vae": False}),
    ({"dynamo_backend": "AOT_EAGER", "dynamo_mode": "max-autotune"}, {"compile": True, "compile_backend": "aot_eager"}),
    (
        {"dynamo_backend": "INDUCTOR", "dynamo_fullgraph": True, "dynamo_dynamic": True},
        {"compile": True, "compile_backend": "inductor", "compile_fullgraph": True, "compile_dynamic": "true"},
    ),
    ({"dynamo_backend": "NO"}, {"compile": False, "torch_compile": False}),
    ({"save_precision": "fp32"}, {"save_precision": "fp32"}),
]


def options_of(words: dict[str, Any], tmp_path: Path, in_file: bool) -> ZImageOptions:
    parser = zimage_train_network.setup_parser()
    if in_file:
        values = {name: str(value).lower() if value is True else repr(value) for name, value in words.items()}
        (tmp_path / "run.toml").write_text("\n".join(f"{name} = {value}" for name, value in values.items()))
        return ZImageOptions.from_args(parse(parser, ["--config_file", str(tmp_path / "run.toml")]))
    line = [word for name, value in words.items() for word in (f"--{name}", *([] if value is True else [value]))]
    return ZImageOptions.from_args(parse(parser, line))


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize(("words", "meaning"), CASES)
def test_words_of_musubi_tuner_stand_for_ours(
    words: dict[str, Any], meaning: dict[str, Any], tmp_path: Path, in_file: bool
) -> None:
    options = options_of(words, tmp_path, in_file)
    values = options.flat()
    assert {name: values[name] for name in meaning} == meaning
    unused = [line for line in find_unused(options, {}) if any(f"--{name} " in line for name in words)]
    assert not unused  # obeyed, so no warning says otherwise


@pytest.mark.parametrize(
    "words",
    [
        {"vae_dtype": "float16", "mixed_precision": "bf16"},
        {"text_encoder_dtype": "float32", "mixed_precision": "bf16"},
        {"flash3": True}, {"use_32bit_attention": True}, {"img_in_txt_in_offloading": True}, {"vae_tiling": True},
        {"disable_numpy_memmap": True}, {"guidance_scale": "3.5"}, {"preserve_distribution_shape": True},
        {"block_swap_h2d_only": True}, {"use_pinned_memory_for_block_swap": True}, {"block_swap_ring_size": "3"},
    ],
)  # fmt: skip
def test_words_without_effect_here_warn_once(words: dict[str, Any], tmp_path: Path) -> None:
    name = next(iter(words))
    lines = [line for line in find_unused(options_of(words, tmp_path, False), {}) if f"--{name} has no effect" in line]
    assert len(lines) == 1
