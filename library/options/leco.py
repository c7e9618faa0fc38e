"""The options of the scripts that train concepts by prompts alone (LECO)."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from library.options.base import group, redeclared
from library.options.caching import CachingOptions, TextCachingOptions
from library.options.dataset import DatasetOptions
from library.options.train import TrainOptions
from library.options.training.concepts import ConceptOptions
from library.options.training.network import NetworkOptions
from library.options.training.validation import ValidationOptions

OptionsT = TypeVar("OptionsT", bound="LecoOptions")

NO_EPOCHS = "a run that is trained by prompts alone has steps and no epochs"
ONE_BATCH = "each adapter would draw other latents, and they share those of a batch"

REFUSED: Mapping[str, str] = {  # option -> why it cannot be had, and the way out
    "network_train_text_encoder_only": "only the denoiser is trained by prompts alone; leave it out",
    "max_train_epochs": f"{NO_EPOCHS}; use --max_train_steps",
    "initial_epoch": f"{NO_EPOCHS}; use --initial_step",
    "save_every_n_epochs": f"{NO_EPOCHS}; use --save_every_n_steps",
    "save_n_epoch_ratio": f"{NO_EPOCHS}; use --save_every_n_steps",
    "sample_every_n_epochs": f"{NO_EPOCHS}; use --sample_every_n_steps",
    "sweep": f"{ONE_BATCH}; train one after the other",
    "fit": "how often a step asks the denoiser is drawn, and is not counted; leave it out",
    "debug_dataset": "there are no pictures to show; leave it out",
    "audit_only": "there are no pictures to look at; leave it out",
    "train_inpainting": "there are no pictures to mask; leave it out, and train on the plain model",
    "shard_base": "each process asks the denoiser another number of times, and all would have to go in step; leave it "
    "out, or use --blocks_to_swap",
}

NO_PICTURES = "prompts are trained alone, without pictures"
IDLE: Mapping[str, str] = {  # option -> why it does nothing
    **dict.fromkeys(
        (
            *DatasetOptions.defaults(), *CachingOptions.defaults(), *ValidationOptions.defaults(),
            *(name for name in TextCachingOptions.defaults() if name != "text_encoder_cpu"), "correct_crop_coordinates",
        ),
        NO_PICTURES,
    ),
    "resolution": "--prompts_file has a resolution for each prompt",
    "train_batch_size": "--prompts_file has a batch_size for each prompt",
    "adaptive_noise_scale": "there are no pictures whose brightness it could follow",
    **dict.fromkeys(
        ("min_timestep", "max_timestep"), "noise levels are those of the way from noise to a picture, evenly drawn"
    ),
    **dict.fromkeys(
        ("ip_noise_gamma", "ip_noise_gamma_random_strength"), "the latents are drawn by the model, none are noised"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class LecoNetworkOptions(NetworkOptions):
    """The adapter and its learning rates."""

    network_module: str | None = redeclared(NetworkOptions, "network_module", "networks.lora")
    network_dim: int | None = redeclared(NetworkOptions, "network_dim", 4)


@dataclass(frozen=True)
class LecoOptions(TrainOptions):
    """All options of train_leco.py."""

    network: LecoNetworkOptions = group(LecoNetworkOptions)
    leco: ConceptOptions = group(ConceptOptions)

    @property
    def concepts(self) -> ConceptOptions:
        return self.leco

    @classmethod
    def from_args(cls: type[OptionsT], args: argparse.Namespace) -> OptionsT:
        """Collect the parsed values. Only the denoiser is ever trained; there is no epoch that a run could begin with.

        Who asks for the text encoders alone is refused later, with a reason.
        """
        options = super().from_args(args)
        trains_denoiser = not options.network.network_train_text_encoder_only
        return options.with_values({"network_train_unet_only": trains_denoiser, "skip_until_initial_step": True})
