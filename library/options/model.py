"""The base model and how its text is read."""

from dataclasses import dataclass
from typing import Any

from library.options.base import Options, option
from library.options.kinds import whole

BASE = "pretrained_model_name_or_path"
BASE_FLAG = f"--{BASE}"
TRAINING_ADAPTER = "training_adapter"


@dataclass(frozen=True)
class ModelFile:
    """A published file of a base model, or of one of its parts."""

    flag: str  # the option that takes it
    repository: str  # on Hugging Face
    file: str  # its name; "" for a whole repository
    gigabytes: float | None = None  # as the hub shows them, in units of 10**9 bytes; None if unknown
    licence: str | None = None  # None if unknown
    is_optional: bool = False  # the model works without
    release: str = ""  # pattern in the base's names or tensors, of the release that this file is for; "" for all

    def __str__(self) -> str:
        size = None if self.gigabytes is None else f"{self.gigabytes:g} GB"
        stated = ", ".join(filter(None, (size, self.licence)))
        return f"{self.file or 'the folder'} of {self.repository}" + (f" ({stated})" if stated else "")


def part(what: str, base: str = "the base") -> Any:
    """Declare the option for the file or folder of a part of the base model, which `base` may have, too."""
    return option(None, f"File or folder of {what}. Unset takes it from {base}.", path="part", usual=True)


def edit() -> Any:
    """Declare the option that musubi-tuner's commands have for models that may be trained with reference images."""
    return option(False, "Refuse a data set without reference images; those of a data set are always trained.")


@dataclass(frozen=True)
class ModelOptions(Options):
    """The base model and how its text is read."""

    pretrained_model_name_or_path: str | None = option(None, path="model", usual=True, logged=False)
    """Base model that the adapter is trained on: a checkpoint file, a folder in diffusers layout, or a Hugging Face
    name, which may end in @ and a branch, tag or commit."""
    variant: str | None = option(None)
    """Variant of the weights in a folder in diffusers layout or a Hugging Face repository, such as fp16: the files with
    it in their names, and no others are downloaded. A part without such files has its plain ones. Unset takes the plain
    ones, or fp16 where there are no others."""
    v2: bool = option(False, usual=True)
    """The base model is Stable Diffusion 2.x."""
    v_parameterization: bool = option(False, usual=True)
    """The base model predicts velocity instead of noise, as Stable Diffusion 2.x at 768 pixels does."""
    vae: str | None = option(None, path="model", usual=True, logged=False)
    """VAE used instead of the base model's own: a file, a folder or a Hugging Face name."""
    no_half_vae: bool = option(False, usual=True)
    """Run the VAE in 32 bits even with --mixed_precision. Cures black images and NaN latents."""
    tokenizer_cache_dir: str | None = option(None, path="new folder", affects_training=False, logged=False)
    """Folder that keeps tokenizers, for machines without internet. Unset uses those of the model or of Hugging Face."""
    max_token_length: int | None = option(None, usual=True, takes_other_values=True, choices=(None, 150, 225))
    """Maximum length of captions in tokens, read in chunks of 75; longer ones are truncated. Unset is 75."""
    clip_skip: int | None = option(None, usual=True, kind=whole(1), zero_is_unset=True)
    """Take the text features from the N-th last layer of the text encoder. Unset or 1 is the last layer; many anime
    models need 2."""
    weighted_captions: bool = option(False)
    """Let captions emphasize words, as in (word:1.3), or weaken them, as in [word]."""


@dataclass(frozen=True)
class ReadingOptions(Options, affects_training=False):
    """How model files are read."""

    disable_mmap_load_safetensors: bool = option(False)
    """Read model files without mapping them into memory. Files are always read this way, tensor by tensor, so this
    option changes nothing."""
