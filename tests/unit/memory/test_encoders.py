"""Text encoders whose layers are streamed, and memory that is released between the stages of a run."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from library.memory.devices import bytes_of, is_on, make_input_contiguous, release_memory
from library.memory.frozen import frozen_layers
from library.memory.offload import encoders as offload
from library.memory.offload.encoders import count_streamed_bytes, least_bytes, place_encoders, stream_layers
from library.memory.offload.streamed import OffloadedHandle
from library.memory.planner.stages import StageMemory
from tests.hiding import lazily
from tests.parity.tiny_models import opened_with
from tests.running import ROOT
from tests.tiers import first_is_fast
from tests.tiny.bases import BASES

transformers = lazily("transformers")

CPU = torch.device("cpu")
CAPTIONS = ["a red cat", "dog"], ["a dog"]


@pytest.mark.parametrize("precision", first_is_fast(["bf16", "no"]))
@pytest.mark.parametrize("base", BASES)
def test_streamed_layers_compute_the_same_bits(base: str, precision: str, tmp_path: Path) -> None:
    _, arch = opened_with(base, [*BASES[base].build(tmp_path), "--mixed_precision", precision])
    resident, streamed = ([encoder.eval() for encoder in arch.load.text_encoders()] for _ in range(2))
    sizes = [bytes_of(encoder) for encoder in streamed]
    for encoder in streamed:  # stream even layers that are too small here to benefit
        stream_layers(encoder, CPU)
    layers = [layer for encoder in streamed for layer in frozen_layers(encoder)]
    assert any(isinstance(layer.handle, OffloadedHandle) for layer in layers)
    assert sum(map(bytes_of, streamed)) < sum(sizes)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.no_grad(), autocast:
        for captions in CAPTIONS:  # the second pass begins with a guess of the ring
            tokens = arch.text.tokenize(captions)
            expected, actual = (arch.text.encode(encoders, tokens) for encoders in (resident, streamed))
            assert actual.keys() == expected.keys()
            for name, tensor in actual.items():
                assert torch.equal(tensor, expected[name]), name


def deep_encoders() -> list[nn.Module]:
    """Return a CLIP of 4 layers and a larger T5 of 8."""
    clip = transformers.CLIPTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2
    )
    t5 = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=96, num_layers=8, num_heads=4)
    return [transformers.CLIPTextModel(clip).eval(), transformers.T5EncoderModel(t5).eval()]


def test_only_the_largest_encoders_are_streamed_and_only_as_many_layers_as_needed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(offload, "MARGIN_BYTES", 1000)
    total = bytes_of(*deep_encoders())

    def streamed(free_bytes: int | None) -> list[str]:
        encoders = deep_encoders()
        place_encoders(encoders, CPU, free_bytes)
        return [type(encoder).__name__ for encoder in encoders if any(frozen_layers(encoder))]

    assert streamed(None) == streamed(total + 1000) == []
    with caplog.at_level(logging.INFO):
        assert streamed(total + 999) == ["T5EncoderModel"]
    assert re.search(r"T5EncoderModel \(\d\.\d MB\) does not fit the GPU beside the others", caplog.text)
    assert streamed(0) == ["CLIPTextModel", "T5EncoderModel"]


def test_the_memory_of_streamed_encoders_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    encoders, rings, open_stream = deep_encoders(), [], offload.stream
    predicted = least_bytes(encoders)
    monkeypatch.setattr(offload, "stream", lambda *args: rings.append(open_stream(*args)))
    place_encoders(encoders, CPU, free_bytes=0)
    slots = sum(slot.numel() for ring in rings for slot in ring.streams.slots)
    assert bytes_of(*encoders) + slots == pytest.approx(predicted, rel=0.01)  # parts of a slot are aligned
    assert sum(map(count_streamed_bytes, deep_encoders())) == predicted < 0.6 * bytes_of(*deep_encoders())


def test_a_stage_is_planned_resident_then_streamed_then_not_at_all() -> None:
    """n captions need 30 + (n - 1) * 20 above the weights, plus 5 % for the allocator."""
    stage = StageMemory("encoding captions", "text_encoder_batch_size", 1000, 30, 20, streamed_weights=100)
    assert stage.most_that_fits(1178) == 8 and not stage.is_streamed(8, 1178)
    assert stage.most_that_fits(1030) == 8 and stage.is_streamed(8, 1030)
    assert stage.most_that_fits(152) == 2 and stage.peak(2, is_streamed=True) == 152
    assert stage.most_that_fits(131) == 0
    assert StageMemory("encoding images", "vae_batch_size", 1000, 30, 20).most_that_fits(1030) == 0


# Memory layout of models, and memory that is released between the stages of a run.

BACKENDS = {"cuda": "torch.cuda", "mps": "torch.mps"}


def test_a_device_without_an_index_matches_any_index() -> None:
    with FakeTensorMode():
        on_gpu, on_cpu = torch.empty(2, device="cuda:0"), torch.empty(2)
    assert is_on(on_gpu, torch.device("cuda")) and is_on(on_gpu, torch.device("cuda", 0))
    assert not is_on(on_gpu, torch.device("cuda", 1)) and not is_on(on_gpu, torch.device("cpu"))
    assert is_on(on_cpu, torch.device("cpu")) and not is_on(on_cpu, torch.device("cuda"))


@pytest.mark.parametrize("available", [*BACKENDS, None])
def test_the_cache_of_the_available_backend_is_emptied(monkeypatch: pytest.MonkeyPatch, available: str | None) -> None:
    emptied: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available == "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available == "mps")
    for name, module in BACKENDS.items():
        monkeypatch.setattr(f"{module}.empty_cache", lambda name=name: emptied.append(name))
    release_memory(keep_cache=True)
    assert emptied == []
    release_memory()
    assert emptied == ([available] if available else [])


CRASH = """
import sys, torch
from torch import nn
from library.memory.devices import move_to_device
layers = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3))
layers.requires_grad_(False)
move_to_device(move_to_device(layers, torch.device("cpu")), torch.device("cpu"))
assert len(layers[1]._forward_pre_hooks) == 1
layers[1].weight.requires_grad_(True)
layers(torch.randn(2, 4, 8, 8)).square().sum().backward()
print(float(layers[1].weight.grad.abs().sum()) > 0)
"""


@pytest.mark.slow
def test_a_group_norm_of_a_frozen_model_can_be_trained_on_the_cpu() -> None:
    """Runs in a process of its own, because torch could crash with a segmentation fault."""
    done = subprocess.run([sys.executable, "-c", CRASH], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_only_an_input_without_a_gradient_changes_its_layout() -> None:
    norm = nn.GroupNorm(2, 8)
    x = torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last)
    (changed,) = make_input_contiguous(norm, (x,)) or ()
    assert changed.is_contiguous() and torch.equal(changed, x)
    assert make_input_contiguous(norm, (x.clone().requires_grad_(),)) is None
    assert make_input_contiguous(norm, (x.contiguous(),)) is None
    with torch.no_grad():
        assert make_input_contiguous(norm, (x,)) is None
