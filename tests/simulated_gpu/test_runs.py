"""Complete runs on the simulated GPU have no faults, and within a step the host waits only where necessary."""

import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library.memory.offload.pinning import Pinned
from library.options.machine.base_formats import BASE_FORMATS
from library.training.loop import loop
from library.training.loop.steps import Steps
from library.training.reporting.step_times import StepTimes
from tests.running import Finished, make_images
from tests.simulated_gpu.device import Simulation
from tests.tiers import first_is_fast
from tests.tiny.base import Base
from tests.tiny.bases import BASES

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("simulated_gpu")]

# Where the host may wait within a step, without line numbers.
ALLOWED = {
    # Results of the previous step: the one place where the host waits for the GPU.
    "synchronize event at library/memory/offload/readback.py (read)",
    # Times of the previous step, which has ended by then.
    "synchronize event at library/training/reporting/step_times.py (span)",
    # Copies of memory that the system refused to pin.
    "unpinned copy to the device at library/memory/devices.py (send)",
    "unpinned copy to the device at library/memory/activations.py (copy)",
    "unpinned copy to the host at library/memory/activations.py (copy)",
    "unpinned copy to the device at library/memory/offload/streams.py (copy)",
    "unpinned copy to the host at library/memory/offload/readback.py (__init__)",
}
CACHED = ("--cache_text_encoder_outputs", "--network_train_unet_only")
MASKS = frozenset(
    {
        f"item at site-packages/transformers/masking_utils.py ({function})"
        for function in ("_ignore_bidirectional_mask_sdpa", "_ignore_causal_mask_sdpa", "find_packed_sequence_indices")
    }
)
OFFLOADED = ("--gradient_checkpointing", "--cpu_offload_checkpointing")


class StepWaits:
    """Records where the host waits within steps, except the first, which creates shared tensors."""

    def __init__(self, simulated_gpu: Simulation, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: Counter[str] = Counter()
        self.num_steps = 0
        self._simulation, self._monkeypatch = simulated_gpu, monkeypatch
        for owner, name in ((loop, "accumulate_gradients"), (Steps, "apply_gradients"), (StepTimes, "end_step")):
            self._watch(owner, name)

    def start(self) -> None:
        """Reset the records at the start of a run."""
        self.found.clear()
        self.num_steps = 0

    def _watch(self, owner: Any, name: str) -> None:
        plain: Callable[..., Any] = getattr(owner, name)

        def watched(*given: Any, **named: Any) -> Any:
            before = self._simulation.waits()
            try:
                return plain(*given, **named)
            finally:
                if self.num_steps:
                    self.found += self._simulation.waits() - before
                self.num_steps += name == "end_step"

        self._monkeypatch.setattr(owner, name, watched)

    def places(self) -> set[str]:
        """Return the operations and places without line numbers."""
        return {re.sub(r":\d+ ", " ", text) for text in self.found}


Run = Callable[..., Finished]


@pytest.fixture
def waits(simulated_gpu: Simulation, monkeypatch: pytest.MonkeyPatch) -> StepWaits:
    return StepWaits(simulated_gpu, monkeypatch)


@pytest.fixture
def run(train: Run, tmp_path: Path, waits: StepWaits) -> Run:
    """Return `run(base, ...)`, which trains three bf16 steps of two images on the GPU and allows only listed waits."""
    make_images(tmp_path / "data" / "1_thing", 6, seed=81)
    models: dict[str, list[str]] = {}

    def start(
        name: str, *more: str, folder: str = "out", caches_text: bool = True, allowed: frozenset[str] = frozenset()
    ) -> Finished:
        base = BASES[name]
        models[name] = models.get(name) or base.build_deep(tmp_path / "model")
        caching = CACHED if caches_text and base.caches_text else ()  # as users do
        arguments = [
            *models[name], *caching, "--train_data_dir", str(tmp_path / "data"), "--caption_extension",
            ".txt", "--resolution", "64", "--train_batch_size", "2", "--output_dir", str(tmp_path / folder),
            "--output_name", "mine", "--network_module", base.module, "--network_dim", "4", "--network_alpha", "2",
            "--learning_rate", "1e-3", "--seed", "5", "--max_data_loader_n_workers", "0", "--max_train_steps", "3",
            "--mixed_precision", "bf16", "--no_report", *more,
        ]  # fmt: skip
        waits.start()
        done = train(arguments, script=base.script).ok()
        assert done.losses and all(map(math.isfinite, done.losses))
        assert waits.num_steps and waits.places() <= ALLOWED | allowed, waits.found
        return done

    return start


def assert_same(a: Path, b: Path) -> None:
    """Assert that two runs gave the same adapter, bit for bit, and that something was learned."""
    ours, theirs = (load_file(folder / "mine.safetensors") for folder in (a, b))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any(weight.any() for key, weight in ours.items() if "lora_up" in key or "lora_B" in key)


FAST = ("flux-nf4", "flux-none")
OFFLOADING = [
    pytest.param(name, form, marks=[] if f"{name}-{form}" in FAST else pytest.mark.slow, id=f"{name}-{form}")
    for name in BASES
    for form in ("none", *BASE_FORMATS)
]


@pytest.mark.parametrize(("name", "form"), OFFLOADING)
def test_swapped_blocks_and_offloaded_activations_train_without_faults(
    run: Run, name: str, form: str, tmp_path: Path
) -> None:
    """The self-test compares every gradient with the plain mode; the file is compared with that of a plain run."""
    stored = ["--cache_latents", *([] if form == "none" else ["--base_format", form])]
    done = run(name, *stored, "--blocks_to_swap", BASES[name].blocks_to_swap, *OFFLOADED, "--selftest")
    assert "(pinned): they are copied while others compute" in done.stderr
    assert re.search(r"self-test: \d+ gradients in \d+ blocks equal those of the plain mode", done.stderr)
    run(name, *stored, folder="plain")
    assert_same(tmp_path / "out", tmp_path / "plain")


@pytest.mark.parametrize("name", first_is_fast(["flux", "sdxl"]))
def test_fp16_with_a_loss_scale_trains_without_faults(run: Run, name: str, tmp_path: Path) -> None:
    run(name, "--mixed_precision", "fp16", *OFFLOADED, "--blocks_to_swap", BASES[name].blocks_to_swap)
    assert any(weight.any() for weight in load_file(tmp_path / "out" / "mine.safetensors").values())


@pytest.mark.slow
def test_fp16_with_an_unfused_optimizer_trains_without_faults(run: Run) -> None:
    """Its loss scale is read on the host before every update."""
    reads = frozenset({"item at library/training/loop/update.py (_step_optimizer)"})
    run("flux", "--mixed_precision", "fp16", "--optimizer_type", "SGD", allowed=reads)


@pytest.mark.slow
def test_blocks_that_cannot_be_pinned_train_without_faults(run: Run, simulated_gpu: Simulation, tmp_path: Path) -> None:
    """Only the buffers can be pinned; a thread stages the blocks and waits for its buffers."""
    of_thread = frozenset({"synchronize event at library/memory/offload/streams.py (stage)"})
    with pytest.MonkeyPatch.context() as patch:
        nothing = Pinned(frozenset(), "it is not wanted")
        patch.setattr("library.memory.offload.streamed.pin", lambda masters, reserve, share: nothing)
        done = run("flux", "--blocks_to_swap", BASES["flux"].blocks_to_swap, *OFFLOADED, allowed=of_thread)
    assert re.search(r"of which \d+ \([\d.]+ GB\) cannot be pinned: it is not wanted", done.stderr)
    run("flux", folder="plain")
    assert_same(tmp_path / "out", tmp_path / "plain")


@pytest.mark.parametrize("name", first_is_fast(["flux", "sdxl", "hunyuan_image"]))
def test_previews_and_validation_between_steps_have_no_faults(run: Run, name: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    drawing = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "1"]
    validating = ["--validation_split", "0.3", "--validate_every_n_steps", "2"]
    swapping = ["--blocks_to_swap", BASES[name].blocks_to_swap, *OFFLOADED]
    run(name, *drawing, *validating, *swapping)
    assert len(list((tmp_path / "out" / "sample").glob("*.png"))) == 3
    run(name, *validating, *swapping, folder="plain")
    assert_same(tmp_path / "out", tmp_path / "plain")


def test_adapters_and_states_saved_between_steps_have_no_faults(run: Run, tmp_path: Path) -> None:
    run("sd", "--cache_latents", "--save_every_n_steps", "1", "--save_state")
    assert len(list((tmp_path / "out").glob("mine-step*-state"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "sd"])
def test_a_resumed_run_equals_the_uninterrupted_one(run: Run, name: str, tmp_path: Path) -> None:
    common = ["--blocks_to_swap", BASES[name].blocks_to_swap, *OFFLOADED, "--network_dropout", "0.1", "--deterministic"]
    run(name, *common, "--max_train_steps", "4")
    run(name, *common, "--max_train_steps", "2", "--save_state", folder="half")
    state = str(tmp_path / "half" / "mine-state")
    run(name, *common, "--max_train_steps", "4", "--resume", state, folder="resumed")
    assert_same(tmp_path / "out", tmp_path / "resumed")


@pytest.mark.slow
@pytest.mark.parametrize("room", ["8GB", "auto"])
def test_a_run_with_fit_trains_without_faults(run: Run, room: str) -> None:
    done = run("flux", "--fit", room, "--cache_latents")
    assert "selected: ->" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, base in BASES.items() if base.caches_text])
def test_encoding_captions_in_each_step_trains_without_faults(run: Run, name: str) -> None:
    """transformers reads the values of attention masks, so every text encoder except CLIP makes the host wait."""
    run(name, "--network_train_unet_only", caches_text=False, allowed=MASKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_no_attention_of_a_step_falls_back_to_the_math_kernel(run: Run, name: str, simulated_gpu: Simulation) -> None:
    run(name)
    kernels = simulated_gpu.attention()
    assert (
        any(text.startswith(("flash", "efficient")) for text in kernels)
        or BASES[name].math_attention != Base.math_attention
    )
    allowed = BASES[name].math_attention
    assert [text for text in kernels if text.startswith("math") and not re.fullmatch(allowed, text)] == []


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "kernel"), [("bf16", "math"), ("fp16", "efficient")])
def test_attention_before_ampere_needs_fp16(
    run: Run, precision: str, kernel: str, simulated_gpu: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA has no fused kernel for bf16 below capability 8.0, so RTX 20 GPUs store all scores."""
    # Its large product of float16 takes minutes on a CPU.
    monkeypatch.setattr("library.training.run.prepare.measure_peak_flops", lambda device, dtype: None)
    with simulated_gpu.configured(capability=7.5):
        run("flux", "--mixed_precision", precision, "--cache_latents")
    of_denoiser = [text for text in simulated_gpu.attention() if "library/models/double_stream" in text]
    assert of_denoiser and all(text.startswith(kernel) for text in of_denoiser)
