"""Impossible weight formats and offloading are refused before anything is read."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from library.architectures.flux.options import FluxOptions
from library.architectures.sd.assembly import build
from library.base.errors import UserError
from library.memory.codecs.codec import AS_IN_FILE
from library.memory.codecs.weight_format import load_format
from library.memory.frozen import layers_in_blocks
from library.memory.offload import shared
from library.options.machine.memory import MemoryOptions
from library.options.no_effect import find_unused
from library.options.train import TrainOptions
from library.processes.process_group import Processes
from library.protocols import Architecture
from library.training.models import frozen_base
from library.training.models.frozen_base import check_base, offload_blocks
from library.training.models.weight_formats import BaseFormats, format_while_reading, store_in_format
from tests.hiding import hide
from tests.parity.deep import DEEP
from tests.unit.test_processes import Board
from tests.unit.training.test_checks import NEEDED
from tests.weight_formats import CODECS


def options(tiny: object, **values: object) -> TrainOptions:
    from argparse import Namespace

    named = {**NEEDED, "pretrained_model_name_or_path": str(tiny), **values}
    return TrainOptions.from_args(Namespace(**{**TrainOptions.defaults(), **named}))


def check(options: TrainOptions, arch: Architecture) -> None:
    check_base(options.precision, options.memory, arch)


def test_nf4_without_bitsandbytes_names_the_package_to_install(
    tiny_sd_folder: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    options_given = options(tiny_sd_folder, base_format="nf4_double")
    arch = build(options_given)
    hide("bitsandbytes", monkeypatch)
    with pytest.raises(UserError, match=r"--base_format nf4_double needs the package bitsandbytes.*--base_format int8"):
        check(options_given, arch)
    check(options(tiny_sd_folder, base_format="int8"), arch)


def test_layers_that_were_stored_while_reading_are_counted(tiny_sd_folder: object) -> None:
    arch = build(options(tiny_sd_folder))
    codec = format_while_reading(load_format("int8"), merges=False)
    num_layers = len(layers_in_blocks(arch.load.denoiser(None)))
    for denoiser in (arch.load.denoiser(None), arch.load.denoiser(codec)):
        assert store_in_format(load_format("int8").codec, denoiser) == num_layers > 0


def test_the_error_for_too_little_main_memory_gives_numbers(
    tiny_sd_folder: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    options_given = options(tiny_sd_folder, blocks_to_swap=4)
    arch = build(options_given)
    check(options_given, arch)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000, total=2000))
    with pytest.raises(UserError, match=r"--blocks_to_swap 4: the denoiser takes .* GB of main memory.* GB are free"):
        check(options_given, arch)


def test_too_many_blocks_to_swap_are_refused_before_anything_is_read(tiny_sd_folder: object) -> None:
    options_given = options(tiny_sd_folder, blocks_to_swap=40)
    with pytest.raises(UserError, match=r"--blocks_to_swap 40: the model has 18 blocks.*at most 16 can be swapped$"):
        check(options_given, build(options_given))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, AS_IN_FILE),
        ({"base_format": "int8"}, CODECS["int8"]),
        ({"base_weights": ["a.safetensors"]}, None),
        ({"base_weights": ["a.safetensors"], "base_format": "int8"}, CODECS["int8"]),
    ],
    ids=["as in the file", "int8", "merged", "merged and int8"],
)
def test_weights_are_encoded_while_they_are_read_unless_adapters_are_merged(
    values: dict[str, object], expected: object, tiny_sd_folder: object
) -> None:
    given = options(tiny_sd_folder, **values)
    denoiser = BaseFormats.load(given.precision).denoiser
    assert format_while_reading(denoiser, bool(given.network.base_weights)) is expected


@pytest.mark.parametrize(("blocks_to_swap", "number"), [(None, 18), (7, 7), (0, 0)])
def test_split_mode_means_18_swapped_blocks_unless_a_number_is_given(blocks_to_swap: int | None, number: int) -> None:
    from argparse import Namespace

    values = {**FluxOptions.defaults(), "split_mode": True, "blocks_to_swap": blocks_to_swap}
    parsed = FluxOptions.from_args(Namespace(**values))
    assert parsed.memory.blocks_to_swap == number
    warnings = [line for line in find_unused(parsed, {}) if "split_mode" in line]
    assert warnings == ([] if blocks_to_swap is None else ["--split_mode has no effect with --blocks_to_swap"])


def test_shared_weights_have_no_file_once_all_processes_have_mapped_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shared, "IN_MEMORY", tmp_path)
    board, deep = Board(), DEEP["flux"]
    models = [deep.frozen(67), deep.frozen(67)]
    num_files: list[int] = []
    rings: list[Any] = []
    original = frozen_base.stream

    def counting_stream(*given: Any) -> Any:
        rings.append(original(*given))
        num_files.append(len(list(tmp_path.glob("weights-*/block_*"))))
        return rings[-1]

    monkeypatch.setattr(frozen_base, "stream", counting_stream)

    def let_wait(rank: int) -> None:
        processes = Processes(rank, 2, rank, 2, store=board)
        offload_blocks(MemoryOptions(blocks_to_swap=4), deep.stacks(models[rank]), torch.device("cpu"), processes)
        processes.wait_for_all("the end")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(let_wait, (0, 1)))
    assert num_files == [6, 6]
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(a, b) for a, b in zip(rings[0].masters, rings[1].masters, strict=True))
