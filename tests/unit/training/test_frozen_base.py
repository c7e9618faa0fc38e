"""Weight formats, arithmetic, offloading and sharding of the frozen base, refused before anything is read."""

import logging
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from library.architectures.flux.options import FluxOptions
from library.architectures.sd.assembly import build
from library.base.errors import UserError
from library.data.description.dataset_file import load_dataset_config
from library.data.description.schema import RunDataConfig
from library.memory.codecs.codec import AS_IN_FILE
from library.memory.codecs.matmul_8bit import FP8
from library.memory.codecs.weight_format import load_format
from library.memory.frozen import freeze_layers, layers_in_blocks
from library.memory.offload import shared
from library.options.machine.memory import MemoryOptions
from library.options.no_effect import find_unused
from library.options.train import TrainOptions
from library.processes.gradient_exchange import Order
from library.processes.process_group import Processes
from library.protocols import Architecture
from library.training.command_line.checks import check as check_options
from library.training.models import frozen_base
from library.training.models.arithmetic import check_arithmetic, try_kind
from library.training.models.compute import Compute
from library.training.models.frozen_base import check_base, offload_blocks, use_8bit_matmul
from library.training.models.opening import far_resolutions, native_sides
from library.training.models.weight_formats import BaseFormats, format_while_reading, store_in_format
from library.training.run.shard_base_checks import resolve_launched_values, sharding_values
from library.training.step.accumulation import Window
from networks.core.protocol import open_network_module
from tests.device_standin import device_without_float64
from tests.hiding import hide
from tests.parity.deep import DEEP
from tests.unit.data.builders import write_config
from tests.unit.test_processes import Board
from tests.unit.training.test_checks import NEEDED
from tests.weight_formats import CODECS, EIGHT_BIT_FORMATS


def options(tiny: object, **values: object) -> TrainOptions:
    from argparse import Namespace

    named = {**NEEDED, "pretrained_model_name_or_path": str(tiny), **values}
    return TrainOptions.from_args(Namespace(**{**TrainOptions.defaults(), **named}))


def check_memory(options: TrainOptions, arch: Architecture) -> None:
    check_base(options.precision, options.memory, arch)


def test_nf4_without_bitsandbytes_names_the_package_to_install(
    tiny_sd_folder: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    options_given = options(tiny_sd_folder, base_format="nf4_double")
    arch = build(options_given)
    hide("bitsandbytes", monkeypatch)
    with pytest.raises(UserError, match=r"--base_format nf4_double needs the package bitsandbytes.*--base_format int8"):
        check_memory(options_given, arch)
    check_memory(options(tiny_sd_folder, base_format="int8"), arch)


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
    check_memory(options_given, arch)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000, total=2000))
    with pytest.raises(UserError, match=r"--blocks_to_swap 4: the denoiser takes .* GB of main memory.* GB are free"):
        check_memory(options_given, arch)


def test_too_many_blocks_to_swap_are_refused_before_anything_is_read(tiny_sd_folder: object) -> None:
    options_given = options(tiny_sd_folder, blocks_to_swap=40)
    with pytest.raises(UserError, match=r"--blocks_to_swap 40: the model has 18 blocks.*at most 16 can be swapped$"):
        check_memory(options_given, build(options_given))


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


# --base_arithmetic 8bit: its requirements are checked before weights are read, and which layers use it.

COMPUTE = Compute(torch.device("cpu"), torch.float32, nullcontext)


def make_options(**values: object) -> TrainOptions:
    named = {**NEEDED, "base_arithmetic": "8bit", **values}
    return TrainOptions.from_args(Namespace(**{**TrainOptions.defaults(), **named}))


def check_device(options: TrainOptions) -> None:
    module = open_network_module(options.network.network_module or "")
    check_arithmetic(BaseFormats.load(options.precision).denoiser, module, build(options), COMPUTE)


@pytest.mark.parametrize("form", EIGHT_BIT_FORMATS)
def test_8_bit_formats_and_one_old_name_are_accepted(form: str) -> None:
    check_options(make_options(base_format=form))
    check_options(make_options(fp8_base=True, mixed_precision="bf16"))


def test_a_checkpoint_with_unquantized_weights_is_refused_before_it_is_read(tiny_sd_folder: Path) -> None:
    options = make_options(pretrained_model_name_or_path=str(tiny_sd_folder))
    with pytest.raises(UserError, match=r"the checkpoint has none that can be; add --base_format int8_rotated"):
        check_device(options)


@pytest.mark.parametrize("form", EIGHT_BIT_FORMATS)
def test_only_fp8_on_a_cpu_is_warned_about(form: str, tiny_sd_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = make_options(pretrained_model_name_or_path=str(tiny_sd_folder), base_format=form)
    with caplog.at_level(logging.INFO):
        check_device(options)
    warnings = [message for message in caplog.messages if "--base_arithmetic" in message]
    assert ["thousands of times slower" in message for message in warnings] == [True] * (form == "fp8")


def test_an_unsupported_device_is_refused_with_its_own_error_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*inputs: Tensor, **more: object) -> Tensor:
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0\nmore")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    with pytest.raises(UserError, match=r"cannot multiply float8_e4m3fn \(torch._scaled_mm is only .* >= 9.0\); int8"):
        try_kind(FP8, COMPUTE)


def test_a_device_with_wrong_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: original(a, b).roll(1, 0))
    with pytest.raises(UserError, match=r"a product of int8 on this cpu is off by \d+%; leave it out"):
        try_kind(torch.int8, COMPUTE)


def test_products_are_checked_on_a_device_without_float64() -> None:
    with device_without_float64() as device:
        try_kind(torch.int8, Compute(device, torch.float32, nullcontext))


def test_third_party_network_modules_are_warned_about(tiny_sd_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = {"pretrained_model_name_or_path": str(tiny_sd_folder), "base_format": "int8"}
    for module, is_warned in (("networks.lora", False), ("lycoris.kohya", True)):
        options = make_options(network_module=module, **values)
        caplog.clear()
        check_device(options)
        assert (f"layers that --network_module {module} adapts" in caplog.text) == is_warned


class Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [nn.Linear(width, 32), nn.Linear(32, 32), nn.Linear(32, 20), nn.Conv2d(8, 8, 3)]
        self.blocks = nn.ModuleList(layers)


def test_layers_that_are_decoded_instead_are_counted_with_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    model = Model(64)
    freeze_layers(CODECS["int8"], model.blocks)
    with caplog.at_level(logging.INFO):
        use_8bit_matmul(model)
    assert caplog.messages[-1] == (
        "denoiser: 2 layers multiply in 8 bits; 2 are decoded: 1 whose sizes are no multiples of 8 (int8) or 16 (fp8), "
        "1 convolutions"
    )
    assert [layer.multiplies_codes for layer in model.blocks] == [True, True, False, False]


def test_a_model_without_suitable_layers_is_refused() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Conv2d(8, 8, 3), nn.Linear(9, 8)])
    freeze_layers(CODECS["int8"], model.blocks)
    with pytest.raises(UserError, match="no layer of the denoiser supports 8-bit products"):
        use_8bit_matmul(model)


# A warning for images far from the size that the base model was trained at.

FAMILY = {"modelspec.resolution": "1024x1024"}
TOY = Path(__file__).parents[3] / "configs" / "quickstart" / "toy_base"


def config_of(folder: Path, *sides: str) -> RunDataConfig:
    datasets = (f'[[datasets]]\nresolution = {side}\n[[datasets.subsets]]\nimage_dir = "a"\n' for side in sides)
    return load_dataset_config(write_config(folder / "data.toml", "".join(datasets)))


@pytest.mark.parametrize(
    ("sides", "is_far"),
    [
        (("256",), True),
        (("512",), False),
        (("1024",), False),
        (("4096",), True),
        (("[512, 2048]",), False),
        (("256", "1024"), False),  # several sizes, one of them the base model's own
    ],
)
def test_a_size_beyond_half_and_twice_the_base_models_is_warned_of(tmp_path, sides, is_far):
    lines = [*far_resolutions(config_of(tmp_path, *sides), native_sides(FAMILY, None))]
    assert bool(lines) == is_far
    if is_far:
        assert "but this base model is trained at 1024x1024" in lines[0]


def test_a_diffusers_folder_states_its_own_size(tmp_path):
    sides = native_sides({"modelspec.resolution": "512x512"}, str(TOY))
    assert sides[0] == 512 and set(sides[1:]) == {64}
    assert not [*far_resolutions(config_of(tmp_path, "64"), sides)]
    assert [*far_resolutions(config_of(tmp_path, "64"), native_sides({"modelspec.resolution": "512x512"}, None))]


# Options that conflict with --shard_base, and sharding requested by accelerate's configuration.

FOUR = Processes(1, 4, 1, 4)


def shared_base(processes: Processes, **values: object) -> dict[str, object]:
    options = TrainOptions().with_values({"shard_base": True, **values})
    return sharding_values(options.distributed, options.memory, options.network, options.compiling, processes)


@pytest.mark.parametrize(
    ("values", "processes", "message"),
    [
        ({"shard_group": 3}, FOUR, "4 processes cannot be divided into groups of 3.*--shard_group 2 or 4"),
        ({"shard_group": 8}, FOUR, "--shard_group 2 or 4"),
        ({}, Processes(0, 2, 0, 1), "each machine has one process.*--shard_group 2"),
        ({"blocks_to_swap": 4}, FOUR, "--shard_base and --blocks_to_swap"),
        ({"compile": True}, FOUR, "leave out --compile"),
        ({"torch_compile": True}, FOUR, "leave out --compile"),
        (
            {"base_weights": ["a.safetensors"], "network_module": "lycoris.kohya"},
            FOUR,
            r"--base_weights and --shard_base with --network_module lycoris\.kohya.*tools/merge_lora\.py first",
        ),
    ],
)
def test_unsupported_combinations_are_refused_with_a_fix(
    values: dict[str, object], processes: Processes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        shared_base(processes, **values)


def test_the_processes_of_a_machine_share_the_base_by_default(caplog: pytest.LogCaptureFixture) -> None:
    assert shared_base(Processes(5, 8, 1, 4)) == {"shard_group": 4}
    assert shared_base(FOUR, shard_group=2) == {"shard_group": 2}
    with caplog.at_level(logging.WARNING):
        alone = shared_base(Processes())
    assert alone == {"shard_base": False, "shard_group": None} and "no effect with one process" in caplog.text


@pytest.mark.parametrize(
    ("is_on", "version", "expected"), [("true", "2", True), ("false", "2", False), ("no", "1", False)]
)
def test_fsdp2_in_accelerates_configuration_enables_sharding(
    monkeypatch: pytest.MonkeyPatch, is_on: str, version: str, expected: bool
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", is_on)
    monkeypatch.setenv("FSDP_VERSION", version)
    assert resolve_launched_values(is_sharded=False) == ({"shard_base": True} if expected else {})


def test_fsdp1_in_accelerates_configuration_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"configured for FSDP 1.*FSDP version 2"):
        resolve_launched_values(is_sharded=False)


def test_a_rank_without_a_batch_gets_a_padding_batch() -> None:
    window = Window(3, 1, range(8, 13), True)
    shares = [window.share(rank, 4) for rank in range(4)]
    assert [len(share) for share in shares] == [2, 1, 1, 1]
    assert [window.padding_batch(rank, 4) for rank in range(4)] == [None, 12, 12, 12]
    assert [replace(window, batch_indices=range(8, 12)).padding_batch(rank, 4) for rank in range(4)] == [None] * 4


def test_batch_orders_are_compared_within_a_group_only() -> None:
    order = Order(7, 2)
    order.require_same([7.0, 7.0, 3.0, 3.0], 1)
    with pytest.raises(RuntimeError, match="different orders"):
        order.require_same([7.0, 7.0, 3.0, 4.0], 2)
