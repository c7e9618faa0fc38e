"""HunyuanImage 2.1's denoiser against diffusers' HunyuanImageTransformer2DModel with the same weights."""

import pytest
import torch

from library.architectures.hunyuan_image.reference import diffusers_model
from tests.tiny.hunyuan_image import GLYPH_MASKS, inputs, oracle_output, tiny_hunyuan_image
from tests.tolerances import FLOAT32_DEEP

SIZES = [(4, 4), (2, 7), (9, 3)]  # of the latent


@pytest.mark.parametrize("glyphs", list(GLYPH_MASKS))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_and_input_gradients_match_diffusers(size: tuple[int, int], glyphs: str) -> None:
    """Gradients of text and glyphs agree too; masked tokens have none."""
    ours = tiny_hunyuan_image(1)
    theirs = diffusers_model(ours)
    results = []
    for run in (lambda values: ours(*values.values()), lambda values: oracle_output(theirs, values)):
        values = inputs(*size, glyphs)
        output = run(values)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
        wanted = [values["latents"], values["text"], values["glyphs"]]
        results.append((output, *torch.autograd.grad((output * weights).sum(), wanted)))
    for ours_value, theirs_value in zip(*results, strict=True):
        torch.testing.assert_close(ours_value, theirs_value, **FLOAT32_DEEP)
    output, latents, text, glyph_gradient = results[0]
    assert min(output.abs().max(), latents.abs().max(), text.abs().max()) > 0.1
    masks = torch.tensor(GLYPH_MASKS[glyphs])
    assert bool((glyph_gradient.abs().sum(-1) > 0).eq(masks > 0).all())


def test_padding_does_not_affect_outputs() -> None:
    model = tiny_hunyuan_image(2)
    values = {name: value.detach() for name, value in inputs(4, 3).items()}
    output = model(*values.values())
    torch.testing.assert_close(
        model(*{**values, "text": values["text"] * values["text_mask"][..., None]}.values()), output, **FLOAT32_DEEP
    )
    short = {name: value[1:2] for name, value in values.items()} | {
        "text": values["text"][1:2, :4],
        "text_mask": values["text_mask"][1:2, :4],
        "glyphs": values["glyphs"][1:2, :0],
        "glyph_mask": values["glyph_mask"][1:2, :0],
    }
    torch.testing.assert_close(model(*short.values()), output[1:2], **FLOAT32_DEEP)
