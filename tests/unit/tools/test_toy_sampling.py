"""The quickstart's image takes adapters of every kind, merged as the trainer merges them."""

import copy
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from library.architectures.sd.targets import view
from library.checkpoints.files import load_state_dict
from networks import boft, loha, lokr, lora, oft_v2
from tests.parity.test_lora_merge import tiny_clip, tiny_unet
from tests.tolerances import FLOAT32_SAME_MATH
from tools.quickstart.sampling import merge_lora

pytestmark = pytest.mark.slow

FORMS: list[tuple[ModuleType, dict[str, str]]] = [
    (lora, {}),
    (lora, {"dora_wd": "True", "conv_dim": "2"}),
    (lora, {"use_tucker": "True", "conv_dim": "2"}),
    (lora, {"train_norm": "True"}),
    (loha, {"conv_dim": "2"}),
    (lokr, {"conv_dim": "2"}),
    (oft_v2, {"enable_conv": "True"}),
    (boft, {"enable_conv": "True"}),
]


@pytest.mark.parametrize(("door", "arguments"), FORMS, ids=str)
def test_an_adapter_of_any_kind_is_merged_as_the_trainer_merges_it(
    door: ModuleType, arguments: dict[str, str], tmp_path: Path
) -> None:
    clip, unet = tiny_clip(5001, torch.float32), tiny_unet(5002, torch.float32)
    pipeline = SimpleNamespace(unet=copy.deepcopy(unet), text_encoder=copy.deepcopy(clip))
    seen = view([clip], unet)
    network = door.create_network(1.0, 3, 2.0, None, *seen, **arguments)
    generator = torch.Generator().manual_seed(5003)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    path = tmp_path / "x.safetensors"
    network.save_weights(str(path), None, {})
    before = copy.deepcopy(unet.state_dict())
    merge_lora(pipeline, load_state_dict(path))
    network.merge_to(*seen, load_state_dict(path))
    for mine, theirs in ((unet, pipeline.unet), (clip, pipeline.text_encoder)):
        for name, tensor in mine.state_dict().items():
            torch.testing.assert_close(theirs.state_dict()[name], tensor, **FLOAT32_SAME_MATH)
    changed = sum(not torch.equal(before[name], tensor) for name, tensor in pipeline.unet.state_dict().items())
    assert changed > 10


def test_a_file_for_another_model_is_named_by_its_first_stranger() -> None:
    clip, unet = tiny_clip(5011, torch.float32), tiny_unet(5012, torch.float32)
    pipeline = SimpleNamespace(unet=unet, text_encoder=clip)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(6, 2)}
    message = f"--lora holds {name}.lora_down.weight, which fits no layer of the base model"
    with pytest.raises(ValueError, match=re.escape(message)):
        merge_lora(pipeline, tensors)
