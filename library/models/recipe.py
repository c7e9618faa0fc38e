"""Declarations that the assemblies of base models share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from library.base.errors import about
from library.diffusion.flow import IGNORES, RECORDS
from library.environment.installed import NEEDED_BY_ALL, check_installed
from library.options.no_effect import is_requested

OTHER_ATTENTION: Mapping[str, str] = {  # options without effect on this project's denoisers
    "xformers": "attention is torch's scaled dot product",
    "mem_eff_attn": "attention is torch's scaled dot product, which needs as little memory",
}


def ignored_by_flow(title: str, **reasons: str) -> dict[str, str]:
    """Return the options without effect on a flow model, each with the reason; `reasons` adds the model's own."""
    return {
        **IGNORES,
        "v2": "it is for models of train_network.py",
        "v_parameterization": f"{title} predicts the velocity of a flow",
        **reasons,
        **OTHER_ATTENTION,
    }


class Values(Protocol):
    """Options, by name."""

    def flat(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Recipe:
    """The shared options that a base model refuses or ignores, and the metadata of files trained on it."""

    title: str  # in messages
    metadata: Mapping[str, str]  # written into every file
    refuses: Mapping[str, str] = field(default_factory=dict)  # unsupported option -> reason
    ignores: Mapping[str, str] = field(default_factory=dict)  # option without effect -> reason
    records: Sequence[str] = ()  # options written into files as ss_<option>
    needs: Mapping[str, str] = field(default_factory=dict)  # package -> versions, if newer than for other base models

    def check(self, options: Values) -> None:
        """Raise UserError for packages that are too old, and for an option that this base model does not support."""
        check_installed(self.title, {**NEEDED_BY_ALL, **self.needs})
        values = options.flat()
        for name, why in self.refuses.items():
            if is_requested(values[name]):
                raise about(f"--{name}", cause="does not fit")(f"does not work with {self.title}: {why}", "remove it")

    def describe(self, options: Values, **more: str) -> dict[str, str]:
        """Return a base model's metadata for trained files; `more` are modelspec.* keys without that prefix."""
        values = options.flat()
        return {
            "ss_v2": "False",
            **self.metadata,
            **{f"ss_{name}": str(values[name]) for name in self.records},
            **{f"modelspec.{name}": value for name, value in more.items()},
        }

    def of_checkpoint(self, architecture: str, predicts_velocity: bool = False) -> dict[str, str]:
        """Return the metadata of an adapter extracted from a checkpoint, for `BaseModelSpec.adapter_metadata`."""
        return {"ss_v2": "False", **self.metadata, "modelspec.architecture": f"{architecture}/lora"}


def build_flow_recipe(
    title: str,
    page: str,
    version: str = "",
    architecture: str = "",
    *,
    weighted_captions: str,
    resolution: str = "1024x1024",
    records: Sequence[str] = (*RECORDS, "text_encoder_lr"),
    refuses: Mapping[str, str] | None = None,
    needs: Mapping[str, str] | None = None,
    **ignores: str,
) -> Recipe:
    """Return the recipe of a flow model; `page` is that of its implementation.

    `version` is its ss_base_model_version and `architecture` its modelspec.architecture, "" if they depend on the file.
    `weighted_captions` is why these are refused, `ignores` as for `ignored_by_flow`.
    """
    named = {"ss_base_model_version": version, "modelspec.architecture": architecture and f"{architecture}/lora"}
    return Recipe(
        title=title,
        metadata={
            **{key: value for key, value in named.items() if value},
            "modelspec.implementation": page,
            "modelspec.resolution": resolution,
        },
        refuses={"weighted_captions": weighted_captions, **(refuses or {})},
        ignores=ignored_by_flow(title, **ignores),
        records=records,
        needs=needs or {},
    )


def folders_of(*files: str | Path | None) -> list[Path]:
    """Return the folder of each model file, or the given folder itself, in order; None is skipped."""
    paths = [Path(file).expanduser() for file in files if file is not None]
    return [path if path.is_dir() else path.parent for path in paths]


def tokenizer_folders(base: str | Path, encoder: str | None, names: Sequence[str] = ("tokenizer",)) -> list[Path]:
    """Return the folders to search for a tokenizer: those of these names in or next to the base model and the
    encoder, then the encoder's own folder."""
    model_folders = folders_of(base, encoder)
    return [folder / name for folder in model_folders for name in names] + model_folders[1:]


def explain_ignored_attention(attn_mode: str | None) -> dict[str, str]:
    """Return {"attn_mode": reason} if --attn_mode has no effect, {} if it names torch's own kernel."""
    return {} if attn_mode in (None, "torch", "sdpa") else {"attn_mode": "attention is torch's scaled dot product"}
