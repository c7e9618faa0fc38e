"""Complete denoisers with enough blocks for swapping, to test the ring, weight formats and block runners."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from library.architectures.anima.model import Anima
from library.architectures.flux import assembly as flux
from library.architectures.flux.model import Flux
from library.architectures.flux_2.model import Flux2
from library.architectures.hunyuan_image.model import HunyuanImage
from library.architectures.krea2.model import SingleStreamDiT
from library.architectures.lumina.model import NextDiT
from library.architectures.qwen_image_21.model import QwenImage21
from library.architectures.sd import assembly as sd
from library.architectures.sd3 import assembly as sd3
from library.architectures.sd3.model import MMDiT
from library.architectures.zimage.model import ZImage
from library.memory.blocks import BlockRunner, Stacks, run_blocks_with, stacks_of
from library.models.adapter_views import view_both, view_denoiser
from library.models.unet.unet import run_unet_blocks_with, unet_stacks
from library.protocols import AdapterView
from tests.tiny import anima as tiny_anima
from tests.tiny import flux as tiny_flux
from tests.tiny import flux_2 as tiny_flux_2
from tests.tiny import hunyuan_image as tiny_hunyuan_image
from tests.tiny import krea2 as tiny_krea2
from tests.tiny import lumina as tiny_lumina
from tests.tiny import qwen_image_21 as tiny_qwen_image_21
from tests.tiny import sd3 as tiny_sd3
from tests.tiny import zimage as tiny_zimage
from tests.tiny.init import fixed_init
from tests.tiny.sd import CLIP, UNET


@dataclass(frozen=True)
class Deep:
    """One base model's denoiser, its inputs, and access to its blocks."""

    build: Callable[[], nn.Module]
    values: Callable[[], tuple[Any, ...]]
    view: AdapterView
    stacks: Callable[[nn.Module], Stacks] = stacks_of
    run_blocks_with: Callable[[nn.Module, BlockRunner], None] = run_blocks_with

    def frozen(self, seed: int) -> nn.Module:
        """Build the frozen denoiser with random weights; convolutions are channels-last, as in runs."""
        model = self.build()
        model.load_state_dict(fixed_init(model, seed))
        return model.requires_grad_(False).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def seen(self, model: nn.Module) -> nn.Module:
        """Return the denoiser as adapters see it."""
        return self.view([CLIPTextModel(CLIPTextConfig(**CLIP))] if self.view is sd.view else [], model)[1]

    def loss(self, model: nn.Module, device: torch.device) -> Tensor:
        """Return a scalar that depends on every value of the output."""
        output = model(*(value.to(device) for value in self.values()))
        output = getattr(output, "sample", output)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(41)).to(device)
        return (output.float() * weights).mean()


def unet_values() -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(42)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 7, UNET["cross_attention_dim"], generator=generator)
    return latents, torch.tensor([17, 801]), text


def flux_values() -> tuple[Any, ...]:
    from tests.parity.test_flux_model import inputs

    return tuple(value.detach() for value in inputs(8, 6, seed=43))


def lumina_values() -> tuple[Any, ...]:
    from tests.parity.test_lumina_model import inputs

    return tuple(value.detach() for value in inputs(8, 6, tokens=(7, 4)))


def anima_values() -> tuple[Any, ...]:
    from tests.parity.test_anima_model import inputs

    return tuple(value.detach() for value in inputs(8, 6, seed=44))


def sd3_values() -> tuple[Any, ...]:
    from tests.parity.test_sd3_model import inputs

    return tuple(value.detach() for value in inputs(tiny_sd3.PLAIN, (8, 6), seed=45).values())


def hunyuan_image_values() -> tuple[Any, ...]:
    from tests.parity.test_hunyuan_image_model import inputs

    return tuple(value.detach() for value in inputs(4, 6, seed=46).values())


def flux_2_values() -> tuple[Any, ...]:
    from tests.parity.test_flux_2_model import inputs

    return tuple(value.detach() for value in inputs(4, 6))


def krea2_values() -> tuple[Any, ...]:
    from tests.parity.test_krea2_model import inputs

    return tuple(value.detach() for value in inputs(4, 6))


def qwen_image_21_values() -> tuple[Any, ...]:
    from tests.parity.test_qwen_image_21_model import inputs

    return tuple(value.detach() for value in inputs(4, 6))


def zimage_values() -> tuple[Any, ...]:
    from tests.parity.test_zimage_model import inputs

    return tuple(value.detach() for value in inputs(8, 6, (5, 40)))


DEEP: Mapping[str, Deep] = {
    "sd": Deep(lambda: UNet2DConditionModel(**UNET), unet_values, sd.view, unet_stacks, run_unet_blocks_with),
    "flux": Deep(lambda: Flux(replace(tiny_flux.CONFIG, num_double=4, num_single=6)), flux_values, flux.view),
    "lumina": Deep(lambda: NextDiT(replace(tiny_lumina.CONFIG, num_layers=6)), lumina_values, view_both),
    "sd3": Deep(lambda: MMDiT(replace(tiny_sd3.PLAIN, depth=6)), sd3_values, sd3.view),
    "hunyuan_image": Deep(
        lambda: HunyuanImage(replace(tiny_hunyuan_image.CONFIG, num_double=4, num_single=6)),
        hunyuan_image_values,
        view_denoiser,
    ),
    "flux_2": Deep(
        lambda: Flux2(replace(tiny_flux_2.CONFIG, num_double=4, num_single=6)), flux_2_values, view_denoiser
    ),
    "krea2": Deep(lambda: SingleStreamDiT(replace(tiny_krea2.CONFIG, num_blocks=6)), krea2_values, view_denoiser),
    "qwen_image_21": Deep(
        lambda: QwenImage21(replace(tiny_qwen_image_21.CONFIG, num_blocks=6)), qwen_image_21_values, view_denoiser
    ),
    "zimage": Deep(lambda: ZImage(replace(tiny_zimage.CONFIG, num_layers=6)), zimage_values, view_denoiser),
    "anima": Deep(lambda: Anima(replace(tiny_anima.CONFIG, num_blocks=6)), anima_values, view_both),
}
