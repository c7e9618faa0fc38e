"""Our claims about ComfyUI against the names that its loader looked up for each checkpoint."""

from collections.abc import Mapping
from functools import cache

import pytest
from torch import Tensor

from library.checkpoints.adapter_keys import AdapterKey, is_of_text_encoder
from library.checkpoints.adapter_names import NAMINGS, FileNaming
from tests.contracts.full_size import facts
from tests.parity.test_what_diffusers_reads import claim_about, file_of
from tests.tiny.bases import BASES

VARIANTS = {name: base.in_comfyui for name, base in BASES.items() if base.in_comfyui}


@cache
def names_found(base: str) -> list[frozenset[str]]:
    """Return the module names that ComfyUI looks up, for each layout of the checkpoint."""
    return [frozenset(names) for names in facts("comfyui_names")["names"][base]]


def used_by_comfyui(base: str, tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the keys that ComfyUI uses with every layout of the checkpoint."""
    modules = {key: adapter_key.module for key in tensors if (adapter_key := AdapterKey.parse(key)) is not None}
    return {key for key, module in modules.items() if all(module in names for names in names_found(base))}


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("base", VARIANTS)
def test_the_keys_we_claim_comfyui_uses_are_those_it_looks_up(base: str, naming: FileNaming) -> None:
    tensors, metadata = file_of(base, VARIANTS[base], naming)
    denoiser = {key: tensor for key, tensor in tensors.items() if not is_of_text_encoder(key)}
    assert len(denoiser) > 200
    claim = claim_about("ComfyUI", denoiser, metadata)
    assert denoiser.keys() - set(claim.unused) == used_by_comfyui(base, denoiser)


@pytest.mark.parametrize(("stem", "is_used"), [("diffusion_model.", [False, True]), ("transformer.", [False, False])])
def test_a_fused_gate_is_looked_up_as_in_the_checkpoint(stem: str, is_used: list[bool]) -> None:
    module = f"{stem}transformer_blocks.0.img_mlp.gate_up"
    assert [module in names for names in names_found("qwen_image_21")] == is_used
