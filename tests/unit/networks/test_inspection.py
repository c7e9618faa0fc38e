"""Ranks, norms and damage of adapter files."""

import math

import pytest
import torch
from torch import Tensor

from networks.core.files.adapter_file import sort_tensors
from networks.core.files.inspection import group_by_block, locate_module, structure_problem, summarise_module
from networks.core.files.module_weights import value_problems

NAME = "lora_unet_down_blocks_0_attentions_0_proj_in"


def tensors_of(seed: int, *kernel: int, rank: int = 3, alpha: float = 2.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, 5, *kernel, generator=generator)
    up = torch.randn(7, rank, *(1,) * len(kernel), generator=generator)
    return {f"{NAME}.lora_down.weight": down, f"{NAME}.lora_up.weight": up, f"{NAME}.alpha": torch.tensor(alpha)}


@pytest.mark.parametrize("kernel", [(), (1, 1), (3, 3)])
def test_norms_equal_those_of_the_full_matrices(kernel: tuple[int, ...]) -> None:
    tensors = tensors_of(920 + len(kernel) + sum(kernel), *kernel)
    summary = summarise_module(sort_tensors(tensors, {}, "").modules[NAME])
    up, down = tensors[f"{NAME}.lora_up.weight"].double(), tensors[f"{NAME}.lora_down.weight"].double()
    assert (summary.rank, summary.alpha) == (3, 2.0)
    assert summary.down_norm == pytest.approx(float(down.norm()), rel=1e-12)
    assert summary.up_norm == pytest.approx(float(up.norm()), rel=1e-12)
    update = 2 / 3 * up.flatten(1) @ down.flatten(1)
    assert summary.update_norm == pytest.approx(float(update.norm()), rel=1e-10)


def test_a_tucker_core_is_multiplied_in() -> None:
    tensors = tensors_of(925, 1, 1)
    mid = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(926))
    summary = summarise_module(sort_tensors({**tensors, f"{NAME}.lora_mid.weight": mid}, {}, "").modules[NAME])
    up, down = tensors[f"{NAME}.lora_up.weight"].double(), tensors[f"{NAME}.lora_down.weight"].double()
    update = 2 / 3 * torch.einsum("op,pqhw,qi->oihw", up.flatten(1), mid.double(), down.flatten(1))
    assert summary.kind == "tucker" and summary.update_norm == pytest.approx(float(update.norm()), rel=1e-10)


def test_norm_weights_have_no_rank() -> None:
    module = sort_tensors(
        {"lora_unet_a.w_norm": torch.tensor([3.0]), "lora_unet_a.b_norm": torch.tensor([4.0])}, {}, ""
    ).modules
    summary = summarise_module(module["lora_unet_a"])
    assert (summary.rank, summary.alpha, summary.update_norm) == (None, None, 5.0)


@pytest.mark.parametrize(
    ("name", "part", "block"),
    [
        (NAME, "denoiser", "down_blocks_0"),
        ("lora_unet_mid_block_resnets_1_conv1", "denoiser", "mid_block"),
        ("lora_unet_conv_in", "denoiser", "outside blocks"),
        ("lora_te_text_model_encoder_layers_11_mlp_fc1", "text encoder (lora_te)", "encoder_layers_11"),
        ("lora_te2_text_model_encoder_layers_3_mlp_fc1", "text encoder (lora_te2)", "encoder_layers_3"),
        ("diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q", "denoiser", "input_blocks_4"),
        (
            "text_encoders.clip_l.transformer.text_model.encoder.layers.3.mlp.fc1",
            "text encoder (text_encoders_clip_l)",
            "encoder_layers_3",
        ),
        ("unet.up_blocks.2.resnets.1.conv1", "denoiser", "up_blocks_2"),
        ("text_encoder_2.text_model.encoder.layers.3.mlp.fc1", "text encoder (text_encoder_2)", "encoder_layers_3"),
        ("lora_unet_double_blocks_12_img_attn_qkv", "denoiser", "double_blocks_12"),
        ("lora_unet_layers_4_attention_qkv", "denoiser", "layers_4"),
        ("transformer.single_transformer_blocks.3.attn.to_q", "denoiser", "single_transformer_blocks_3"),
    ],
)
def test_a_module_name_is_located_in_its_part_and_block(name: str, part: str, block: str) -> None:
    assert locate_module(name) == (part, block)


def test_blocks_add_up_and_are_sorted_by_number() -> None:
    generator = torch.Generator().manual_seed(930)
    tensors: dict[str, Tensor] = {}
    for block, rank in ((10, 2), (2, 3), (2, 4)):
        name = f"lora_te_text_model_encoder_layers_{block}_fc{rank}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, 5, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(6, rank, generator=generator)
    summary = [summarise_module(module) for module in sort_tensors(tensors, {}, "").modules.values()]
    second, tenth = group_by_block(summary)
    assert (second.block, second.num_modules, second.ranks) == ("encoder_layers_2", 2, (3, 4))
    assert (tenth.block, tenth.ranks, tenth.alphas) == ("encoder_layers_10", (2,), (2.0,))
    assert second.update_norm == pytest.approx(math.hypot(summary[1].update_norm or 0, summary[2].update_norm or 0))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"lora_up.weight": None}, "lora_down.weight without its up factor"),
        ({"lora_down.weight": None}, "lora_up.weight without its down factor"),
        ({"lora_down.weight": torch.ones(4, 5)}, "do not fit together"),
    ],
)
def test_structural_damage_is_reported(damage: dict[str, Tensor | None], message: str) -> None:
    tensors = {**tensors_of(931), **{f"{NAME}.{leaf}": tensor for leaf, tensor in damage.items()}}
    module = sort_tensors({key: t for key, t in tensors.items() if t is not None}, {}, "").modules[NAME]
    assert message in (structure_problem(module) or "")


def test_an_intact_module_has_no_problem() -> None:
    module = sort_tensors(tensors_of(932), {}, "").modules[NAME]
    assert structure_problem(module) is None and list(value_problems(module)) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_counted(value: float) -> None:
    tensors = tensors_of(933)
    tensors[f"{NAME}.lora_up.weight"][2, 1] = value
    problems = list(value_problems(sort_tensors(tensors, {}, "").modules[NAME]))
    assert problems == [f"{NAME}.lora_up.weight has 1 of 21 values that are not finite"]
