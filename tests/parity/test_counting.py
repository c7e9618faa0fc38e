"""Memory counted from headers alone against the allocator's events of the same step on real weights."""

import gc
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.base.progress import listening
from library.base.randomness import generator_for
from library.memory.blocks import plain, recompute
from library.memory.devices import bytes_of
from library.memory.planner.gpus import TYPICAL
from library.memory.planner.prediction import MemoryMode, predict
from library.memory.planner.steps import compute_peak_bytes
from library.memory.planner.weights import StorageCost
from library.options.train import TrainOptions
from library.protocols import Architecture
from library.training.models.base_model import LoadedModels
from library.training.models.compute import Compute
from library.training.models.frozen_base import use_8bit_matmul
from library.training.models.network import create
from library.training.models.requests import RequestedRun
from library.training.models.step_context import step_context
from library.training.models.weight_formats import BaseFormats, format_while_reading
from library.training.planning.counting import CountedRun, count_run
from library.training.planning.meta_run import BatchShape, longest_caption
from library.training.step.context import Models
from library.training.step.losses import loss_of
from library.training.step.pairs import split_passes
from library.types import Batch, CaptionWithImages
from networks.core.protocol import adopt, open_network_module
from tests.parity.tiny_models import opened_with
from tests.running import SCRIPTS
from tests.runs.test_memory_modes import quantise_and_dequantise
from tests.tiny.bases import BASES
from tests.unit.memory.planner.made_up import allocated_peak

pytestmark = pytest.mark.usefixtures("fresh_process")  # reading options configures logging

# Rotary tables and caption features of small models are up to 3 %; at full size each part is less than 0.4 %.
SHARE = 0.03
SHAPE = BatchShape(2, 256, 192)
CPU = torch.device("cpu")
FAST = (("sd", False), ("flux", True))  # the others repeat these checks


def open_tiny(name: str, folder: Path, *more: str) -> tuple[TrainOptions, Architecture]:
    """Return options and architecture of a tiny base model of which only the denoiser is adapted."""
    return opened_with(name, [*BASES[name].build(folder), "--cache_latents", "--network_train_unet_only", *more])


def count_options(options: TrainOptions, arch: Architecture, shape: BatchShape) -> CountedRun:
    return count_run(RequestedRun.resolve(options, arch), shape, CPU)


def real_step(options: TrainOptions, arch: Architecture, shape: BatchShape, recomputes: bool) -> Callable[[], None]:
    """Return the run's forward and backward pass on real weights and tensors."""
    encoders, denoiser = (
        arch.load.text_encoders(),
        arch.load.denoiser(format_while_reading(BaseFormats.load(options.precision).denoiser, merges=False)),
    )
    if options.precision.multiplies_codes:
        use_8bit_matmul(denoiser)
    models = Models(denoiser, encoders, None, arch.view(encoders, denoiser))
    assert options.network.network_module is not None
    network = adopt(create(options.network, open_network_module(options.network.network_module), models))
    network.apply_to(*models.network_view, False, True)
    network.module.train()
    arch.run_blocks_with(denoiser, recompute if recomputes else plain)
    compute = Compute.build(options.precision, CPU)
    loaded = LoadedModels(models, None, None)
    context = step_context(False, 1, arch, 7, loaded, network, compute, pairs=options.pairs)
    spec = arch.codec.spec
    latents = torch.randn(shape.count, spec.channels, shape.height // spec.downscale, shape.width // spec.downscale)
    batch = Batch(
        keys=[str(i) for i in range(shape.count)],
        captions=[longest_caption(arch)] * shape.count,
        pixels_BCHW=None,
        latents_BCHW=latents,
        conditioning=None,
        loss_weights_B=torch.ones(shape.count),
        masks_B1HW=None,
        sizes_B6=torch.ones(shape.count, 6),
        attributes=[{}] * shape.count,
        reference_latents=tuple(torch.randn_like(latents) for _ in shape.reference_sizes),
        are_pairs=options.pairs.are_trained,
    )

    def step() -> None:
        for pass_batch in split_passes(context, batch):
            loss_of(context, pass_batch, 0).backward()

    return step


def planned_peak(counted: CountedRun, recomputes: bool) -> int:
    return compute_peak_bytes(list(counted.step.timeline.expand(lambda i: recomputes, lambda i: True)))


@pytest.mark.parametrize(
    ("name", "recomputes"),
    [
        pytest.param(*case, marks=[] if case in FAST else pytest.mark.nightly)
        for case in itertools.product(BASES, (False, True))
    ],
)
def test_the_counted_step_matches_the_allocator_for_every_base_model(
    name: str, recomputes: bool, tmp_path: Path
) -> None:
    options, arch = open_tiny(name, tmp_path / "model", "--mixed_precision", "no")
    shape = BatchShape(*BASES[name].count_shape)
    counted = count_options(options, arch, shape)
    torch.manual_seed(94)
    real = allocated_peak(real_step(options, arch, shape, recomputes))
    assert planned_peak(counted, recomputes) == pytest.approx(real, rel=BASES[name].count_share)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize(
    "recomputes", [False, pytest.param(True, marks=pytest.mark.nightly)], ids=["keeps all", "recomputes all"]
)
@pytest.mark.parametrize(
    "words",
    [("--preference_loss", "dpo"), pytest.param(("--pair_slider", "1"), marks=pytest.mark.nightly)],
    ids=["dpo", "slider"],
)
@pytest.mark.parametrize("name", ["sd", pytest.param("flux", marks=pytest.mark.nightly)])
def test_the_counted_step_of_pairs_matches_the_allocator(
    name: str, words: tuple[str, str], recomputes: bool, tmp_path: Path
) -> None:
    """Preferences take one pass for both images after the reference pass; a slider takes one pass for each."""
    options, arch = open_tiny(name, tmp_path / "model", "--mixed_precision", "no", *words)
    shape = replace(SHAPE, reference_sizes=((SHAPE.width, SHAPE.height),))
    step = count_options(options, arch, shape).step
    torch.manual_seed(96)
    real = allocated_peak(real_step(options, arch, shape, recomputes))
    counted = compute_peak_bytes(list(step.timeline.expand(lambda i: recomputes, lambda i: True)))
    assert counted + step.held_gradient_bytes == pytest.approx(real, rel=SHARE)
    assert (step.held_gradient_bytes > 0) == (words[0] == "--pair_slider")
    assert (step.gradientless is None) == (words[0] == "--pair_slider")


@pytest.mark.nightly
def test_the_preference_reference_costs_a_forward_pass(tmp_path: Path) -> None:
    """The reference pass adds to the time, and to the peak if it decodes more than is kept."""
    options, arch = open_tiny("sd", tmp_path / "model", "--mixed_precision", "no", "--preference_loss", "dpo")
    step = count_options(options, arch, replace(SHAPE, reference_sizes=((SHAPE.width, SHAPE.height),))).step
    gpu = replace(TYPICAL[0], memory_bytes=1 << 40)
    alone = replace(step, gradientless=None)
    assert 1.2 < predict(step, MemoryMode(), gpu).seconds / predict(alone, MemoryMode(), gpu).seconds < 1.5
    assert step.gradientless is not None and step.gradientless.num_passes == step.gradientless.num_batches == 1
    assert (
        0
        < step.gradientless.peak_bytes
        < compute_peak_bytes(list(step.timeline.expand(lambda _: False, lambda _: True)))
    )


@pytest.mark.nightly
def test_activations_of_dora_per_output_are_counted(tmp_path: Path) -> None:
    words = ["--network_args", "dora_wd=True", "wd_on_output=True"]
    options, arch = open_tiny("flux", tmp_path / "model", "--mixed_precision", "no", *words)
    counted = count_options(options, arch, SHAPE)
    torch.manual_seed(99)
    real = allocated_peak(real_step(options, arch, SHAPE, False))
    assert planned_peak(counted, False) == pytest.approx(real, rel=SHARE)


def test_an_adapter_created_from_a_file_is_counted(tmp_path: Path) -> None:
    """The file is a LoKr of separate q, k and v."""
    leaves = {"lokr_w1": (4, 4), "lokr_w2_a": (16, 2), "lokr_w2_b": (2, 16)}
    stems = [f"lycoris_transformer_blocks_{i}_attn_to_{part}" for i in (0, 1) for part in "qkv"]
    path = tmp_path / "theirs.safetensors"
    save_file({f"{stem}.{leaf}": torch.ones(leaves[leaf]) for stem in stems for leaf in leaves}, path)
    options, arch = open_tiny("flux", tmp_path / "model", "--mixed_precision", "no")
    of_file = {"network_module": "networks.lokr", "network_weights": str(path), "dim_from_weights": True}
    options = options.with_values({**of_file, "network_dim": None})
    counted = count_options(options, arch, SHAPE)
    torch.manual_seed(101)
    real = allocated_peak(real_step(options, arch, SHAPE, False))
    assert planned_peak(counted, False) == pytest.approx(real, rel=SHARE)


@pytest.mark.nightly
@pytest.mark.parametrize("recomputes", [False, True], ids=["keeps all", "recomputes all"])
def test_memory_of_8_bit_matmul_is_counted(recomputes: bool, tmp_path: Path) -> None:
    """Count rounded activations and 32-bit sums before scaling. CPUs cast the sums in an extra copy that no GPU makes,
    up to a tenth of so small a step."""
    arithmetic = ["--base_format", "int8_rotated", "--base_arithmetic", "8bit"]
    options, arch = open_tiny("flux", tmp_path / "model", "--mixed_precision", "no", *arithmetic)
    counted = count_options(options, arch, SHAPE)
    torch.manual_seed(97)
    real = allocated_peak(real_step(options, arch, SHAPE, recomputes))
    assert 0.9 * real < planned_peak(counted, recomputes) < 1.01 * real
    assert predict(counted.step, MemoryMode("int8_rotated"), TYPICAL[0]).seconds > 0


def test_weights_stored_in_8_bits_are_counted_in_8_bits(tmp_path: Path) -> None:
    options, arch = open_tiny("flux", tmp_path / "model", "--mixed_precision", "bf16")
    plain = count_options(options, arch, SHAPE).step
    path = Path(str(options.model.pretrained_model_name_or_path))
    codes, _ = quantise_and_dequantise(load_file(path))
    save_file(codes, path)
    num_codes = sum(value.numel() for value in codes.values() if value.dtype == torch.float8_e4m3fn)
    options, arch = reopen(options, arch)
    step = count_options(options, arch, SHAPE).step
    sizes = [counted.weights.resident_bytes(StorageCost.of(None), ()) for counted in (plain, step)]
    num_rows = sum(matrix.rows for block in step.weights.blocks for matrix in block)
    assert sizes[0] - sizes[1] == num_codes - 4 * num_rows, "16 bits become 8, and a scale for each row"
    for form in ("bf16", "nf4"):
        requested_sizes = [counted.weights.resident_bytes(StorageCost.of(form), ()) for counted in (plain, step)]
        assert requested_sizes[0] == requested_sizes[1]


@pytest.mark.slow
def test_the_counted_encoding_of_references_matches_the_allocator(tmp_path: Path) -> None:
    """The text encoder receives two references per caption; for the VAE one is larger than the image."""
    words = ("--mixed_precision", "no", "--cache_text_encoder_outputs")
    options, arch = open_tiny("qwen_image_21", tmp_path / "model", *words)
    sizes = ((256, 192), (384, 256))
    images, captions = count_options(options, arch, replace(SHAPE, reference_sizes=sizes)).stages
    encoders, vae = arch.load.text_encoders(), arch.load.vae()
    assert captions.weights == bytes_of(*encoders)
    caption = CaptionWithImages(longest_caption(arch), "", lambda: tuple(torch.rand(4, h, w) * 2 - 1 for w, h in sizes))
    for count in (1, 2):
        tokens = arch.text.tokenize([caption] * count)
        with torch.no_grad():
            real = allocated_peak(lambda: arch.text.encode(encoders, tokens))  # noqa: B023
        counted = captions.rise_of_one + (count - 1) * captions.rise_of_each_more
        assert counted == pytest.approx(real, rel=SHARE)
    pixels_BCHW = torch.rand(1, 3, 256, 384)
    with torch.no_grad():
        real = allocated_peak(lambda: arch.codec.encode(vae, pixels_BCHW, [generator_for(0, "planned")]))
    assert images.rise_of_one == pytest.approx(real, rel=BASES["qwen_image_21"].count_share)


def reopen(options: TrainOptions, arch: Architecture) -> tuple[TrainOptions, Architecture]:
    """Build the model again after its files have changed."""
    return options, next(spec for spec in SCRIPTS.values() if type(options) is spec.options).build(options)


@pytest.mark.nightly
def test_a_moving_average_always_takes_four_bytes_per_trained_value(tmp_path: Path) -> None:
    options, arch = open_tiny("sd", tmp_path / "model", "--mixed_precision", "no")
    plain = count_options(options, arch, SHAPE).step
    averaged = count_options(options.with_values({"ema_decay": 0.99}), arch, SHAPE).step
    for part in ("state", "rise"):
        more = getattr(averaged.optimizer, part) - getattr(plain.optimizer, part)
        assert more == plain.gradient_bytes > 0  # gradients are float32 too


def test_progress_is_shown_while_counting(tmp_path: Path) -> None:
    options, arch = open_tiny("sd", tmp_path / "model", "--mixed_precision", "no")
    progress: list[tuple[str, str, int, int]] = []
    with listening(lambda *update: progress.append(update)):
        count_options(options, arch, SHAPE)
    assert [done for _, state, done, _ in progress if state == "progress"] == [1, 2, 3, 4, 5]
    assert {(title, total) for title, _, _, total in progress} == {("counting memory", 5)}
    assert gc.isenabled()
