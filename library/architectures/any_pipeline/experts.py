"""Two denoisers that share the noise levels, as in Wan 2.2 A14B: one is trained at its own levels, both draw."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from library.base.errors import UserError, about
from library.checkpoints import metadata
from library.checkpoints.adapter_keys import to_underscores
from library.checkpoints.adapter_names import BaseNames, ModuleNames, name_by_path
from library.checkpoints.headers import read_metadata
from library.diffusion.timesteps import NUM_TIMESTEPS, resolve_timestep_range
from library.options.training.noise import NoiseOptions

ExpertName = Literal["high", "low"]
COMPONENTS: Mapping[str, str] = {"high": "transformer", "low": "transformer_2"}
SAVED_AS: Mapping[str, str] = {COMPONENTS["low"]: COMPONENTS["high"]}
"""Component -> the one that keys in files name: diffusers loads files of both under the first one's names."""
BOUNDARY = "boundary_ratio"  # the pipeline's setting: the noise level from which on the high one draws
EVERYWHERE: Mapping[str, float] = {"high": 0.0, "low": 2.0}  # boundaries with which one of them draws alone


@dataclass(frozen=True)
class Expert:
    """The denoiser that is trained of two: `high` draws at the boundary and above, `low` below."""

    name: str
    boundary: float

    @property
    def component(self) -> str:
        return COMPONENTS[self.name]

    @property
    def resting(self) -> str:
        """The other denoiser, which is not loaded."""
        return next(component for name, component in COMPONENTS.items() if name != self.name)

    @property
    def metadata(self) -> dict[str, str]:
        """The entries of saved files."""
        return {metadata.EXPERT: self.name, metadata.BOUNDARY: f"{self.boundary:g}"}

    def describe(self) -> str:
        """Return the line of the log."""
        levels = f"from {self.boundary:g} on" if self.name == "high" else f"below {self.boundary:g}"
        return (
            f"--expert {self.name} trains {self.component} at noise levels {levels}; previews of the run are drawn "
            "with it alone, tools/draw.py draws with both"
        )

    def narrow(self, noise: NoiseOptions) -> NoiseOptions:
        """Return the options with the range of timesteps at which this denoiser draws.

        Raises UserError if the range that the user wants has none of them.
        """
        lowest, highest = resolve_timestep_range(noise, NUM_TIMESTEPS)
        # The pipeline compares timesteps, which are whole.
        limit = math.ceil(NUM_TIMESTEPS * self.boundary - 1e-6)
        first, last = (max(lowest, limit), highest) if self.name == "high" else (lowest, min(highest, limit))
        if first > last or (first == last and lowest < highest):
            own = f"{limit} to {NUM_TIMESTEPS}" if self.name == "high" else f"0 to {limit}"
            raise about("--expert", cause="does not fit", others=["--min_timestep", "--max_timestep"])(
                f"{self.name} draws at the timesteps {own}, of which none lies between --min_timestep {lowest} and "
                f"--max_timestep {highest}",
                "leave them out, or choose others",
            )
        return replace(noise, min_timestep=first, max_timestep=last)


def read_boundary(components: Mapping[str, Any], settings: Mapping[str, Any]) -> float | None:
    """Return the noise level at which two denoisers change; None for a pipeline with one."""
    value = settings.get(BOUNDARY)
    return float(value) if isinstance(value, int | float) and set(COMPONENTS.values()) <= components.keys() else None


def choose_expert(pipeline: str, boundary: float | None, wanted: str | None) -> Expert | None:
    """Return the denoiser to train. Raises UserError if there are two and none is wanted, or the other way round."""
    if boundary is None:
        if wanted is not None:
            raise about("--expert", cause="does not fit")(f"{wanted}: {pipeline} has one denoiser", "remove it")
        return None
    if wanted is None:
        high, low = COMPONENTS.values()
        raise about("--expert", cause="missing")(
            f"is required: {pipeline} has two denoisers, {high} for noise levels from {boundary:g} on and {low} for "
            "those below. Add --expert high or --expert low, and train the other one in a run of its own"
        )
    return Expert(wanted, boundary)


def expert_of(entries: Mapping[str, str], origin: str | Path) -> str:
    """Return the denoiser that a file was trained on. Raises UserError if its metadata does not say it."""
    name = entries.get(metadata.EXPERT, "")
    if name not in COMPONENTS:
        raise UserError(
            f"{origin} does not say on which of two denoisers it was trained ({metadata.EXPERT} in its metadata, high "
            "or low)",
            "use a file that was trained with --expert",
        )
    return name


def name_modules(base: str, component: str, paths: Sequence[str], is_of_file: bool = False) -> BaseNames:
    """Return the names of a denoiser's layers, which differ between the two; with `is_of_file` also those in files of
    either, which are the same."""
    modules = []
    for path in paths:
        saved = name_by_path(COMPONENTS["high"], path)
        own, flat = f"{component}.{path}", f"lora_{component}_{to_underscores(path)}"
        modules.append(ModuleNames(flat, own, own, saved.spellings if is_of_file else ()))
    return BaseNames(base, tuple(modules))


class Experts(nn.Module):
    """Both denoisers of a pipeline, which draw in turn. Adapters act on one of them."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        first = next(iter(parts.values()))
        self._repeated_blocks = getattr(first, "_repeated_blocks", None)
        self._no_split_modules = getattr(first, "_no_split_modules", None)


def list_parts(denoiser: nn.Module) -> Mapping[str, nn.Module]:
    """Return both denoisers by component."""
    return dict(denoiser.get_submodule("parts").named_children())


def find_part(denoiser: nn.Module, file: Path) -> nn.Module:
    """Return the denoiser of two that a file was trained on."""
    return denoiser.get_submodule(f"parts.{COMPONENTS[expert_of(read_metadata(file), file)]}")
