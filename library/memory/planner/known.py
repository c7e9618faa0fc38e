"""Plans of usual trainings from counts kept in models.json, without any file of a model. Needs no torch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.base.formatting import format_gib
from library.memory.planner.gpus import Gpu, fuses
from library.memory.planner.selection import offload_for_spare, select
from library.memory.planner.speed import StepSpeed, Work

FILE = Path(__file__).with_name("models.json")  # written by benchmarks/plan_models.py
MIB = 2**20
MOST_TIMES = 1.2  # larger or smaller than a model that was counted


@dataclass(frozen=True)
class KnownFormat:
    """The denoiser's weights in one format, by the number of offloaded blocks."""

    name: str
    error: float | None
    slowdown: float
    resident_mib: Sequence[int]  # of all frozen weights on the GPU
    offloaded_mib: Sequence[int]
    offloaded_share: Sequence[float]  # of the blocks


@dataclass(frozen=True)
class KnownMode:
    """Recomputation and offloaded inputs, and what they cost."""

    options: str
    complexity: int  # without offloaded blocks
    forward: Work
    backward: Work
    inputs_mib: int  # in main memory
    other_mib: Mapping[str, int]  # format -> GPU memory besides weights


@dataclass(frozen=True)
class KnownModel:
    """The counts of a usual training of a base model."""

    title: str
    spec: str  # name of the `BaseModelSpec`
    side: int  # of the images, in pixels
    num_passes: int  # of its recipe
    disk_mib: int  # of the model's files
    formats: Sequence[KnownFormat]
    modes: Sequence[KnownMode]
    unfused_modes: Sequence[KnownMode] = ()  # without fused operations; empty if the model has none


@dataclass(frozen=True)
class KnownCandidate:
    """A configuration of a known model on a GPU."""

    options: str
    weight_format: str
    error: float | None
    complexity: int
    device_bytes: int
    host_bytes: int
    seconds: float


@dataclass(frozen=True)
class ModelPlan:
    """The choice for one model on one GPU; `least_bytes` is what the smallest configuration needs."""

    model: KnownModel
    chosen: KnownCandidate | None
    least_bytes: int


def load_models() -> list[KnownModel]:
    """Return the models of the data file."""
    return [read_model(entry) for entry in json.loads(FILE.read_text(encoding="utf-8"))]


def read_model(entry: Mapping[str, Any]) -> KnownModel:
    modes = {
        name: [
            KnownMode(**{**mode, "forward": Work(*mode["forward"]), "backward": Work(*mode["backward"])})
            for mode in entry[name]
        ]
        for name in ("modes", "unfused_modes")
    }
    return KnownModel(**{**entry, **modes, "formats": [KnownFormat(**item) for item in entry["formats"]]})


def find_model(spec: str, num_values: int) -> KnownModel | None:
    """Return the model of this base model whose denoiser has about as many values; None if none was counted."""
    models = [model for model in load_models() if model.spec == spec]
    # A value has two bytes in bf16, the first format.
    ratios = {2 * num_values / (model.formats[0].resident_mib[0] * MIB): model for model in models}
    near = [ratio for ratio in ratios if 1 / MOST_TIMES < ratio < MOST_TIMES]
    return ratios[min(near, key=lambda ratio: abs(ratio - 1))] if near else None


def plan(model: KnownModel, gpu: Gpu, system: str) -> ModelPlan:
    """Choose how a usual training runs on a GPU under a system, by the rule of --fit."""
    modes = model.modes if fuses(gpu, system) else model.unfused_modes or model.modes
    candidates = [
        offload_for_spare(
            lambda count, item=item, mode=mode: predict(item, mode, count, gpu),  # type: ignore[misc]
            len(item.resident_mib) - 1,
            gpu,
        )
        for item in model.formats
        for mode in modes
    ]
    least = min(candidate.device_bytes for candidate in candidates)
    return ModelPlan(model, select(candidates, gpu), least)


def predict(item: KnownFormat, mode: KnownMode, num_offloaded: int, gpu: Gpu) -> KnownCandidate:
    """Return the memory and time with this number of offloaded blocks."""
    speed = StepSpeed(mode.forward, mode.backward, item.slowdown)
    offloaded, inputs = item.offloaded_mib[num_offloaded] * MIB, mode.inputs_mib * MIB
    words = (
        "" if item.name == "bf16" else f"--base_format {item.name}",
        mode.options,
        f"--blocks_to_swap {num_offloaded}" if num_offloaded else "",
    )
    return KnownCandidate(
        " ".join(filter(None, words)) or "plain",
        item.name,
        item.error,
        mode.complexity + 2 * (num_offloaded > 0),
        (item.resident_mib[num_offloaded] + mode.other_mib[item.name]) * MIB,
        offloaded + inputs,
        speed.seconds(gpu, offloaded / gpu.bus, inputs / gpu.bus, item.offloaded_share[num_offloaded]),
    )


def rows(plans: Sequence[ModelPlan]) -> Iterator[tuple[str, ...]]:
    """Yield the headings and one row per model."""
    yield "model", "options", "GPU memory", "main memory", "disk", "step", "recipe"
    for found in plans:
        title, disk = f"{found.model.title}, {found.model.side} px", format_gib(found.model.disk_mib * MIB)
        if (chosen := found.chosen) is None:
            yield title, f"does not fit: needs {format_gib(found.least_bytes)}", "", "", disk, "", ""
            continue
        hours = chosen.seconds * found.model.num_passes / 3600
        yield (
            title,
            chosen.options,
            format_gib(chosen.device_bytes),
            format_gib(chosen.host_bytes),
            disk,
            f"{chosen.seconds:.2f} s",
            f"{hours:.1f} h" if hours else "",
        )
