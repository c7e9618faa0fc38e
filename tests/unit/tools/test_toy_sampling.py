"""The quickstart's image generator accepts adapters in any naming and rejects those for another model."""

import copy
from types import SimpleNamespace

import pytest
import torch

from library.base.errors import UserError
from tests.parity.test_lora_merge import tiny_clip, tiny_unet
from tests.tolerances import FLOAT32_SAME_MATH
from tools.quickstart.sampling import merge_lora

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def test_an_adapter_is_merged_at_its_strength() -> None:
    pipeline = SimpleNamespace(unet=tiny_unet(5002, torch.float32), text_encoder=tiny_clip(5001, torch.float32))
    before = copy.deepcopy(pipeline.unet.state_dict())
    width = before[f"{LAYER}.weight"].shape[0]
    generator = torch.Generator().manual_seed(5003)
    down, up = torch.randn(3, width, generator=generator), torch.randn(width, 3, generator=generator)
    name = f"lora_unet_{LAYER.replace('.', '_')}"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.5)}
    merge_lora(pipeline, tensors, 0.4)
    after = pipeline.unet.state_dict()
    expected = before[f"{LAYER}.weight"] + 0.4 * 1.5 / 3 * up @ down
    torch.testing.assert_close(after[f"{LAYER}.weight"], expected, **FLOAT32_SAME_MATH)
    assert [key for key, tensor in after.items() if not torch.equal(tensor, before[key])] == [f"{LAYER}.weight"]


def test_a_file_for_another_model_is_refused() -> None:
    pipeline = SimpleNamespace(unet=tiny_unet(5012, torch.float32), text_encoder=tiny_clip(5011, torch.float32))
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(6, 2)}
    with pytest.raises(UserError, match="--lora: none of its 1 modules is in this base model"):
        merge_lora(pipeline, tensors)
