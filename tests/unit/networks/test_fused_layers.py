"""Layers that are fused in the original checkpoint and separate in diffusers."""

import pytest
import torch
from torch import Tensor

from library.checkpoints.adapter_names import BaseNames, FileNaming, ModuleNames, Piece
from networks.core.files.adapter_file import adapter_tensors, parse_adapter
from networks.core.files.renaming import rename

FUSED = ModuleNames(
    "lora_unet_blocks_0_linear1",
    "diffusion_model.blocks.0.linear1",
    (Piece("transformer.b.0.to_q", 1), Piece("transformer.b.0.to_k", 1), Piece("transformer.b.0.mlp", 2)),
)
NAMES = BaseNames("toy", (FUSED,))
WHOLE = FUSED.kohya


def whole(seed: int, rank: int = 4, alpha: float = 2.0, num_outputs: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{WHOLE}.alpha": torch.tensor(alpha),
        f"{WHOLE}.lora_down.weight": torch.randn(rank, 5, generator=generator),
        f"{WHOLE}.lora_up.weight": torch.randn(num_outputs, rank, generator=generator),
    }


def renamed(tensors: dict[str, Tensor], to: FileNaming) -> dict[str, Tensor]:
    return adapter_tensors(rename(parse_adapter(tensors, {}, "x"), NAMES, to).file)


def change(tensors: dict[str, Tensor]) -> Tensor:
    (module,) = parse_adapter(tensors, {}, "x").modules.values()
    return module.weight(torch.float64)


def test_each_piece_gets_its_rows() -> None:
    tensors = whole(970)
    pieces = renamed(tensors, "diffusers")
    products = [
        pieces[f"{piece.diffusers}.lora_B.weight"].double() @ pieces[f"{piece.diffusers}.lora_A.weight"].double()
        for piece in FUSED.pieces
    ]
    assert [product.shape[0] for product in products] == [3, 3, 6]
    torch.testing.assert_close(torch.cat(products), change(tensors), rtol=0, atol=1e-12)


def test_splitting_and_fusing_again_keeps_rank_and_change() -> None:
    tensors = whole(971)
    back = renamed(renamed(tensors, "diffusers"), "kohya")
    assert back.keys() == tensors.keys() and back[f"{WHOLE}.lora_down.weight"].shape == (4, 5)
    assert torch.equal(change(back), change(tensors))


def piece_of(name: str, rank: int, num_outputs: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.lora_A.weight": torch.randn(rank, 5, generator=generator),
        f"{name}.lora_B.weight": torch.randn(num_outputs, rank, generator=generator),
    }


@pytest.mark.parametrize("to", ["kohya", "generic"])
def test_separately_trained_pieces_are_fused_with_the_sum_of_their_ranks(to: FileNaming) -> None:
    """diffusers trains the pieces separately. The file has them in another order and lacks to_k."""
    mlp, q = piece_of("transformer.b.0.mlp", 2, 6, 972), piece_of("transformer.b.0.to_q", 3, 3, 973)
    joined = renamed({**mlp, **q}, to)
    (module,) = parse_adapter(joined, {}, "x").modules.values()
    assert (module.rank, module.scale) == (5, 1.0)
    expected = torch.cat([change(q), torch.zeros(3, 5, dtype=torch.float64), change(mlp)])
    torch.testing.assert_close(module.weight(torch.float64), expected, rtol=0, atol=1e-12)


def test_pieces_stay_separate_in_the_diffusers_naming() -> None:
    mlp, q = piece_of("transformer.b.0.mlp", 2, 6, 974), piece_of("transformer.b.0.to_q", 3, 3, 975)
    after = renamed({**mlp, **q}, "diffusers")
    assert after.keys() == mlp.keys() | q.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in {**mlp, **q}.items())


def test_sizes_that_do_not_match_are_errors() -> None:
    with pytest.raises(ValueError, match="has 10 outputs, which is no multiple of 4"):
        renamed(whole(976, num_outputs=10), "diffusers")
    q, mlp = piece_of("transformer.b.0.to_q", 3, 3, 977), piece_of("transformer.b.0.mlp", 2, 8, 978)
    with pytest.raises(ValueError, match=f"sizes of the pieces of {WHOLE} do not fit"):
        renamed({**q, **mlp}, "kohya")


def test_a_piece_next_to_its_fused_layer_is_an_error() -> None:
    with pytest.raises(ValueError, match=f"has the module {WHOLE} twice"):
        renamed({**whole(979), **piece_of("transformer.b.0.to_q", 3, 3, 980)}, "kohya")
