"""SD3's text conditioning, compared with calling transformers for each caption separately."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.architectures.sd3.assembly import build
from library.architectures.sd3.options import Sd3Options
from library.architectures.sd3.text import Sd3Text, mask_to_end
from library.options.ranges import check_ranges
from library.types import Conditioning
from tests.tolerances import FLOAT32_DEEP
from tests.unit.architectures.sd3.test_load import options_of

CAPTIONS = ["a red cat and a dog", "", "dog"]
NUM_T5_TOKENS = 12


@pytest.fixture(scope="module")
def parts(sd3_file: Path) -> tuple[Sd3Text, list[nn.Module]]:
    arch = build(options_of(sd3_file, t5xxl_max_token_length=NUM_T5_TOKENS))
    assert isinstance(arch.text, Sd3Text)
    return arch.text, arch.load.text_encoders()


def encode(parts: tuple[Sd3Text, list[nn.Module]], captions: list[str], **settings: bool) -> Conditioning:
    text, encoders = parts
    text = replace(text, **settings)
    with torch.no_grad():
        return text.encode(encoders, text.tokenize(captions))


def clip_ids(text: Sd3Text, caption: str, pad: int | None) -> Tensor:
    begin, end = text.clip.tokenizer.bos_token_id, text.clip.tokenizer.eos_token_id
    ids = [begin, *text.clip.tokenizer(caption, add_special_tokens=False)["input_ids"][:75], end]
    return torch.tensor([ids + [end if pad is None else pad] * (77 - len(ids))])


@torch.no_grad()
def test_clip_features_are_the_penultimate_states_and_the_projected_end_token(
    parts: tuple[Sd3Text, list[nn.Module]],
) -> None:
    text, encoders = parts
    features = encode(parts, CAPTIONS)
    for b, caption in enumerate(CAPTIONS):
        states, pooled = [], []
        for encoder, pad in zip(encoders[:2], (None, 0), strict=True):
            output: Any = encoder(clip_ids(text, caption, pad), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        torch.testing.assert_close(features["lg_out"][b], torch.cat(states, -1)[0], **FLOAT32_DEEP)
        torch.testing.assert_close(features["lg_pooled"][b], torch.cat(pooled, -1)[0], **FLOAT32_DEEP)


@torch.no_grad()
def test_t5_features_are_its_last_states(parts: tuple[Sd3Text, list[nn.Module]]) -> None:
    text, encoders = parts
    features = encode(parts, CAPTIONS)
    assert features["t5_out"].shape == (3, NUM_T5_TOKENS, 96)
    for b, caption in enumerate(CAPTIONS):
        ids = text.t5_tokenizer(caption)["input_ids"]
        padded = torch.tensor([ids + [0] * (NUM_T5_TOKENS - len(ids))])
        output: Any = encoders[2](padded)
        torch.testing.assert_close(features["t5_out"][b], output.last_hidden_state[0], **FLOAT32_DEEP)
        assert features["t5_attn_mask"][b].tolist() == [1] * len(ids) + [0] * (NUM_T5_TOKENS - len(ids))


@torch.no_grad()
def test_masked_t5_padding_does_not_affect_a_caption(parts: tuple[Sd3Text, list[nn.Module]]) -> None:
    text, encoders = parts
    ids = text.t5_tokenizer(CAPTIONS[0])["input_ids"]
    alone: Any = encoders[2](torch.tensor([ids]))
    masked, plain = encode(parts, CAPTIONS, masks_t5=True), encode(parts, CAPTIONS)
    torch.testing.assert_close(masked["t5_out"][0, : len(ids)], alone.last_hidden_state[0], **FLOAT32_DEEP)
    assert (plain["t5_out"][0, : len(ids)] - alone.last_hidden_state[0]).abs().max() > 1e-3


def test_clip_masks_change_only_the_padding(parts: tuple[Sd3Text, list[nn.Module]]) -> None:
    """CLIP's attention is causal, so a caption's own tokens are unaffected by what follows."""
    masked, plain = encode(parts, CAPTIONS, masks_clip=True), encode(parts, CAPTIONS)
    for b in range(len(CAPTIONS)):
        count = int(plain["clip_l_attn_mask"][b].sum())
        torch.testing.assert_close(masked["lg_out"][b, :count], plain["lg_out"][b, :count], **FLOAT32_DEEP)
        assert (masked["lg_out"][b, count:] - plain["lg_out"][b, count:]).abs().max() > 1e-3
    torch.testing.assert_close(masked["lg_pooled"], plain["lg_pooled"], **FLOAT32_DEEP)


def test_masks_end_with_the_first_end_token() -> None:
    ids = torch.tensor([[8, 3, 4, 9, 9, 9], [8, 9, 0, 0, 0, 0], [8, 1, 2, 3, 4, 9]])
    assert mask_to_end(ids, 9).tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1] * 6]


def test_a_caption_is_encoded_independently_of_its_batch(parts: tuple[Sd3Text, list[nn.Module]]) -> None:
    together, alone = encode(parts, CAPTIONS), encode(parts, CAPTIONS[2:])
    for name in together:
        torch.testing.assert_close(together[name][2:], alone[name], **FLOAT32_DEEP)


def test_long_captions_are_truncated_but_counted_in_full(parts: tuple[Sd3Text, list[nn.Module]]) -> None:
    text, _ = parts
    long = " ".join(["cat"] * 300)
    ids = text.tokenize([long]).ids_BLT
    assert [t.shape for t in ids] == [(1, 1, 77), (1, 1, 77), (1, 1, NUM_T5_TOKENS), (1, 1, NUM_T5_TOKENS)]
    assert ids[0][0, 0, -1] == text.clip.end_id and ids[2][0, 0, -1] == 1, "each ends with its end token"
    assert text.count_tokens(long) > 75 and text.max_tokens == 75
    wide = replace(text, num_t5_tokens=256)
    assert wide.max_tokens == 255 and wide.count_tokens(long) > 255


def test_a_t5_token_limit_below_2_is_refused(sd3_file: Path) -> None:
    with pytest.raises(ValueError, match="--t5xxl_max_token_length is 1; use at least 2"):
        check_ranges(options_of(sd3_file, t5xxl_max_token_length=1))


def test_the_cache_identity_changes_with_every_setting_that_changes_its_values(sd3_file: Path) -> None:
    def identity(**flags: Any) -> str:
        spec = build(options_of(sd3_file, **flags)).text_cache
        assert spec is not None
        return f"{spec.encoders()} {spec.settings}"

    variants = [{}, {"apply_t5_attn_mask": True}, {"apply_lg_attn_mask": True}, {"t5xxl_max_token_length": 20}]
    identities = [identity(**flags) for flags in (*variants, {"mixed_precision": "bf16"})]
    assert len(set(identities)) == 5
    assert identity() == identities[0]


def test_the_cache_has_the_same_entries_as_sd_scripts(sd3_file: Path) -> None:
    spec = build(options_of(sd3_file, apply_t5_attn_mask=True)).text_cache
    assert spec is not None and spec.suffix == "_sd3_te.npz"
    assert {*spec.keys, *spec.constants} == {
        "lg_out", "lg_pooled", "t5_out", "clip_l_attn_mask", "clip_g_attn_mask", "t5_attn_mask", "apply_lg_attn_mask",
        "apply_t5_attn_mask",
    }  # fmt: skip
    assert bool(spec.constants["apply_t5_attn_mask"]) and not bool(spec.constants["apply_lg_attn_mask"])
    assert isinstance(Sd3Options().text_caching, type(spec.options))
