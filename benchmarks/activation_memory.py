"""Count the memory that autograd keeps for the U-Net's backward pass with networks.lora_fa and with networks.lora.

The U-Net has the sizes of Stable Diffusion 1.5 but only shapes, so this takes seconds and hardly any memory. Weights
are not counted, and a tensor that several layers keep is counted once. Gradient checkpointing is off.

    python benchmarks/activation_memory.py
    python benchmarks/activation_memory.py --side 768 --rank 16 --precision fp32
"""

import argparse
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.autograd.graph import saved_tensors_hooks  # noqa: E402

from library.architectures.sd.targets import view  # noqa: E402
from networks import lora, lora_fa  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_models(dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, nn.Module]]:
    """Return the U-Net in `dtype`, and (text encoders, U-Net) as network modules see them."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=1, num_attention_heads=12)
    encoder = CLIPTextModel(clip)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    finally:
        torch.set_default_dtype(default)
    return unet.requires_grad_(False), view([encoder.requires_grad_(False)], unet)


def kept_bytes(module: ModuleType, args: argparse.Namespace, arguments: Mapping[str, str]) -> tuple[int, int]:
    """Return (bytes kept for the backward pass of one batch, number of trained parameters)."""
    dtype = DTYPES[args.precision]
    with FakeTensorMode():
        unet, models = build_models(dtype)
        network = module.create_network(1.0, args.rank, args.rank, None, *models, **arguments)
        network.apply_to(*models, False, True)
        weights = {t.untyped_storage()._cdata for one in (unet, network) for t in one.state_dict().values()}
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                storages[storage._cdata] = storage
            return tensor

        latents = torch.randn(args.batch, 4, args.side // 8, args.side // 8)
        context = torch.randn(args.batch, 77, 768)
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype)
        with saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
            unet(latents, torch.full((args.batch,), 500), context)
        num_trained = sum(parameter.numel() for parameter in network.parameters())
        return sum(storage.nbytes() for storage in storages.values()), num_trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512, help="side of the images, in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    args = parser.parse_args()
    for name, arguments in (("attention blocks", {}), ("and convolutions", {"conv_dim": str(args.rank)})):
        (plain, plain_trained), (frozen, trained) = (kept_bytes(m, args, arguments) for m in (lora, lora_fa))
        print(
            f"{name}: lora {plain / 2**20:.0f} MiB kept, {plain_trained / 1e6:.1f} M trained; lora_fa "
            f"{frozen / 2**20:.0f} MiB ({frozen / plain:.3f}), {trained / 1e6:.1f} M trained"
        )


if __name__ == "__main__":
    main()
