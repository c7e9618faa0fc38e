"""Stable Diffusion 3: checkpoints, inputs of the denoiser, text conditioning and random variation."""

import logging
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from library.architectures.sd3.assembly import build, build_objective, sampling_sigmas
from library.architectures.sd3.conditioning_dropout import Variation
from library.architectures.sd3.layers import view
from library.architectures.sd3.load import DENOISER_PREFIX, open_loader
from library.architectures.sd3.options import Sd3Options
from library.architectures.sd3.predict import join_context, locate_corner, predict
from library.architectures.sd3.text import Sd3Text, mask_to_end
from library.models.dit_loader import DitLoader
from library.options.ranges import check_ranges
from library.types import Conditioning
from tests.running import tiny_model
from tests.tiny.sd3 import CONFIGS, build_tiny_sd3
from tests.tolerances import FLOAT32_DEEP

# A file with all text encoders and each part in a file next to it, and one without them.
sd3_file = tiny_model("sd3", 21)
sd3_without_text = tiny_model("sd3", 21, with_text=False)


def options_of(path: Path | str | None, **flags: Any) -> Sd3Options:
    options = {"pretrained_model_name_or_path": None if path is None else str(path), **flags}
    assert options.keys() <= Sd3Options.defaults().keys()
    return Sd3Options.from_args(Namespace(**{**Sd3Options.defaults(), **options}))


def open_tiny(path: Path | str | None, **flags: Any) -> DitLoader:
    return open_loader(options_of(path, **flags))[0]


def catch_refusal(path: Path | str | None, **flags: Any) -> str:
    with pytest.raises(ValueError) as refused:
        open_tiny(path, **flags)
    return str(refused.value)


def float_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in module.state_dict().items()}


def encoder_files(folder: Path) -> dict[str, str]:
    return {name: str(folder / f"{name}.safetensors") for name in ("clip_l", "clip_g", "t5xxl")}


def write_renamed_copy(path: Path, target: Path, change: Any) -> Path:
    """Copy a single file with its names mapped by `change`, and link the tokenizers next to it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {new: tensor for key, tensor in load_file(path).items() if (new := change(key)) is not None}
    save_file(tensors, target)
    for folder in ("tokenizer", "tokenizer_3"):
        (target.parent / folder).symlink_to(path.parent / folder)
    return target


def test_text_encoders_in_the_single_file_match_the_separate_files(sd3_file: Path, sd3_without_text: Path) -> None:
    inside = open_tiny(sd3_file).text_encoders()
    separate = open_tiny(sd3_without_text, **encoder_files(sd3_file.parent)).text_encoders()
    assert [type(encoder).__name__ for encoder in inside] == [
        "CLIPTextModelWithProjection",
        "CLIPTextModelWithProjection",
        "T5EncoderModel",
    ]
    for name, a, b in zip(("clip_l", "clip_g", "t5xxl"), inside, separate, strict=True):
        in_file = load_file(sd3_file.parent / f"{name}.safetensors")
        assert float_state(a).keys() == float_state(b).keys()
        assert all(torch.equal(float_state(a)[key], float_state(b)[key]) for key in float_state(a))
        loaded = {key.removeprefix("text_model."): tensor for key, tensor in float_state(a).items()}
        assert all(torch.equal(loaded[key.removeprefix("text_model.")], tensor) for key, tensor in in_file.items())


@pytest.mark.parametrize("prefix", [DENOISER_PREFIX, ""])
def test_the_denoiser_loads_with_and_without_its_prefix(sd3_file: Path, tmp_path: Path, prefix: str) -> None:
    path = write_renamed_copy(
        sd3_file, tmp_path / "m" / "a.safetensors", lambda key: key.replace(DENOISER_PREFIX, prefix, 1)
    )
    expected = {
        key.removeprefix(DENOISER_PREFIX): tensor
        for key, tensor in load_file(sd3_file).items()
        if key.startswith(DENOISER_PREFIX)
    }
    actual = float_state(open_tiny(path).denoiser())
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in actual)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_size_is_recognised_by_its_weights(tmp_path: Path, name: str) -> None:
    options = options_of(build_tiny_sd3(tmp_path / "m", 22, name))
    _, config = open_loader(options)
    assert config == CONFIGS[name]
    version = {"sd3-medium": "medium", "sd3.5-large": "5-large", "sd3.5-medium": "5-medium"}[name]
    metadata = build(options).metadata
    assert metadata["ss_base_model_version"] == version
    assert metadata["modelspec.architecture"] == f"stable-diffusion-3-{version}/lora"


def test_a_separate_vae_replaces_that_of_the_checkpoint(sd3_file: Path, tmp_path: Path) -> None:
    without = write_renamed_copy(
        sd3_file, tmp_path / "m" / "a.safetensors", lambda key: None if key.startswith("first_stage") else key
    )
    assert "has no VAE" in catch_refusal(without) and "--vae" in catch_refusal(without)
    actual = float_state(open_tiny(without, vae=str(sd3_file.parent / "vae.safetensors")).vae())
    expected = float_state(open_tiny(sd3_file).vae())
    assert actual.keys() == expected.keys() and all(torch.equal(actual[key], expected[key]) for key in expected)


def test_the_error_for_a_missing_clip_names_its_flag(sd3_without_text: Path) -> None:
    assert "has no text encoder clip_l" in catch_refusal(sd3_without_text)
    files = encoder_files(sd3_without_text.parent)
    assert "use --clip_g" in catch_refusal(sd3_without_text, clip_l=files["clip_l"])


def test_training_without_t5_is_warned_about(sd3_without_text: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = encoder_files(sd3_without_text.parent)
    del files["t5xxl"]
    with caplog.at_level(logging.WARNING):
        arch = build(options_of(sd3_without_text, **files))
    assert "no T5" in caplog.text and "--t5xxl" in caplog.text
    encoders = arch.load.text_encoders()
    assert len(encoders) == 2 and len(view(encoders, arch.load.denoiser())[0]) == 2
    assert arch.text.max_tokens == 75
    assert "t5_out" not in arch.text.encode(encoders, arch.text.tokenize(["a cat"]))


def test_clip_l_without_a_projection_uses_the_identity(sd3_file: Path, tmp_path: Path) -> None:
    tensors = load_file(sd3_file.parent / "clip_l.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "clip_l.safetensors")
    encoder: Any = open_tiny(sd3_file, clip_l=str(tmp_path / "clip_l.safetensors")).text_encoders()[0]
    assert torch.equal(encoder.text_projection.weight, torch.eye(16))


def test_clip_g_without_a_projection_is_refused(sd3_file: Path, tmp_path: Path) -> None:
    tensors = load_file(sd3_file.parent / "clip_g.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "clip_g.safetensors")
    message = catch_refusal(sd3_file, clip_g=str(tmp_path / "clip_g.safetensors"))
    assert "clip_g.safetensors" in message and "text_projection.weight" in message


def test_encoders_of_other_models_are_refused(sd3_file: Path) -> None:
    files = encoder_files(sd3_file.parent)
    assert "--clip_l and --clip_g have 16 and 16 pooled features" in catch_refusal(sd3_file, clip_g=files["clip_l"])
    assert "is not a T5 encoder" in catch_refusal(sd3_file, t5xxl=files["clip_l"])
    swapped = catch_refusal(sd3_file, clip_l=files["clip_g"], clip_g=files["clip_l"])
    assert "have 32 and 16 pooled features" in swapped and "not swapped" in swapped


def test_a_path_that_is_not_a_single_file_is_refused(tiny_sd_folder: Path, tmp_path: Path) -> None:
    assert "is a folder; SD3 requires a single file" in catch_refusal(tmp_path)
    assert "--pretrained_model_name_or_path is missing" in catch_refusal(None)
    assert "does not exist" in catch_refusal(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("flag", ["clip_l_dropout_rate", "t5_dropout_rate", "pos_emb_random_crop_rate"])
def test_dropout_rates_must_lie_between_0_and_1(sd3_file: Path, flag: str) -> None:
    assert build(options_of(sd3_file)).vary is None
    assert build(options_of(sd3_file, **{flag: 0.5})).vary is not None
    with pytest.raises(ValueError, match=f"--{flag} is 1.5; it is a share"):
        check_ranges(options_of(sd3_file, **{flag: 1.5}))


# Inputs of Stable Diffusion 3's denoiser and the conversion of its output.

BATCH: Any = None  # the denoiser does not read the batch


class Recorder(nn.Module):
    """A denoiser that records its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(context_width=12, patch=2, positions_side=24)

    def table_side(self, h: int, w: int) -> int:
        return 24

    def forward(self, *inputs: Any) -> Tensor:
        self.inputs = inputs
        output: Tensor = inputs[0] * 0.5 + 0.1
        return output


def features(with_t5: bool = True) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(4)
    clip_features = {"lg_out": torch.randn(3, 77, 8, generator=g), "lg_pooled": torch.randn(3, 6, generator=g)}
    return {**clip_features, "t5_out": torch.randn(3, 5, 12, generator=g)} if with_t5 else clip_features


def noised(seed: int = 5) -> Any:
    objective = build_objective(Sd3Options())
    return objective.corrupt(torch.randn(3, 16, 8, 6), torch.Generator().manual_seed(seed))


def test_the_context_is_both_clips_padded_with_zeros_followed_by_t5() -> None:
    inputs = features()
    context = join_context(inputs, 12)
    assert context.shape == (3, 82, 12)
    assert torch.equal(context[:, :77, :8], inputs["lg_out"]) and context[:, :77, 8:].eq(0).all()
    assert torch.equal(context[:, 77:], inputs["t5_out"])


def test_without_t5_its_77_tokens_are_zero() -> None:
    context = join_context(features(with_t5=False), 12)
    assert context.shape == (3, 154, 12) and context[:, 77:].eq(0).all()


def test_the_denoiser_gets_whole_timesteps_out_of_1000() -> None:
    model, state = Recorder(), noised()
    predict(model, state, features(), BATCH)
    latents, timesteps, _, pooled, corner = model.inputs
    assert torch.equal(latents, state.latents_BCHW) and torch.equal(pooled, features()["lg_pooled"])
    assert torch.equal(timesteps, timesteps.round()) and torch.allclose(timesteps, 1000 * state.sigmas_B)
    assert corner is None


def test_the_output_is_converted_to_an_estimate_of_the_clean_latent() -> None:
    objective, state = build_objective(Sd3Options()), noised()
    estimate = objective.estimate(predict(Recorder(), state, features(), BATCH), state)
    x = state.latents_BCHW.double()
    expected = x - state.sigmas_B.double().view(-1, 1, 1, 1) * (x * 0.5 + 0.1)
    torch.testing.assert_close(estimate.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(objective.target(state), state.clean_BCHW)


@pytest.mark.parametrize(
    ("share", "corner"), [((0.0, 0.0), (0, 0)), ((0.999, 0.999), (20, 21)), ((0.5, 0.25), (10, 5))]
)
def test_the_crop_can_be_anywhere_in_the_position_table(share: tuple[float, float], corner: tuple[int, int]) -> None:
    assert locate_corner(torch.tensor([share]), 4, 3, side=24) == corner


def test_the_drawn_crop_position_reaches_the_denoiser() -> None:
    model = Recorder()
    predict(model, noised(), {**features(), "position": torch.tensor([[0.5, 0.25]] * 3)}, BATCH)
    assert model.inputs[-1] == (10, 5)


@pytest.mark.parametrize("num_steps", [1, 7, 30])
@pytest.mark.parametrize("shift", [3.0, 1.0])
def test_preview_sigmas_match_diffusers(num_steps: int, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(num_steps)
    torch.testing.assert_close(sampling_sigmas(num_steps, shift).float(), scheduler.sigmas[:-1], rtol=1e-5, atol=1e-6)


# SD3's text conditioning, compared with calling transformers for each caption separately.

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


# Random dropout of text encoders and random crops of the position table, drawn for each training step.

L, G, T5 = 3, 5, 7


def conditioning(num_samples: int, with_t5: bool = True) -> dict[str, torch.Tensor]:
    features = {
        "lg_out": torch.ones(num_samples, 4, L + G),
        "lg_pooled": torch.ones(num_samples, 2 * (L + G)),
        "clip_l_attn_mask": torch.ones(num_samples, 4, dtype=torch.int64),
        "clip_g_attn_mask": torch.ones(num_samples, 4, dtype=torch.int64),
    }
    if with_t5:
        features |= {"t5_out": torch.ones(num_samples, 6, T5), "t5_attn_mask": torch.ones(num_samples, 6)}
    return features


def vary(num_samples: int, seed: int = 1, with_t5: bool = True, **rates: float) -> Conditioning:
    all_rates = {"clip_l": 0.0, "clip_g": 0.0, "t5": 0.0, "position": 0.0} | rates
    variation = Variation(**all_rates, clip_l_width=L, clip_l_pooled_width=2 * L)  # type: ignore[arg-type]
    return variation(conditioning(num_samples, with_t5), torch.Generator().manual_seed(seed))


def test_nothing_changes_at_rate_0() -> None:
    before, after = conditioning(4), vary(4)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_dropping_an_encoder_zeroes_its_states_pooled_features_and_mask_only() -> None:
    after = vary(2, clip_l=1.0)
    assert after["lg_out"][..., :L].eq(0).all() and after["lg_out"][..., L:].eq(1).all()
    assert after["lg_pooled"][:, : 2 * L].eq(0).all() and after["lg_pooled"][:, 2 * L :].eq(1).all()
    assert after["clip_l_attn_mask"].eq(0).all() and after["clip_g_attn_mask"].eq(1).all()
    after = vary(2, clip_g=1.0, t5=1.0)
    assert after["lg_out"][..., :L].eq(1).all() and after["lg_out"][..., L:].eq(0).all()
    assert after["t5_out"].eq(0).all() and after["t5_attn_mask"].eq(0).all()


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_each_sample_and_each_encoder_is_dropped_independently(rate: float) -> None:
    n = 20_000
    after = vary(n, clip_l=rate, clip_g=rate, t5=rate)
    drops = torch.stack([after["lg_out"][:, 0, 0] == 0, after["lg_out"][:, 0, -1] == 0, after["t5_out"][:, 0, 0] == 0])
    deviation = (rate * (1 - rate) / n) ** 0.5
    assert (drops.double().mean(1) - rate).abs().max() < 4 * deviation
    both = (drops[0] & drops[1]).double().mean().item()
    assert abs(both - rate**2) < 4 * (rate**2 / n) ** 0.5


def test_one_rate_does_not_affect_the_draws_of_another() -> None:
    alone, together = vary(500, t5=0.3), vary(500, t5=0.3, clip_l=0.7)
    assert torch.equal(alone["t5_out"], together["t5_out"])


def test_without_t5_no_t5_features_are_added() -> None:
    assert "t5_out" not in vary(3, with_t5=False, t5=1.0)


def test_a_whole_batch_shares_one_random_position() -> None:
    assert "position" not in vary(3)
    places = torch.stack([vary(3, seed, position=0.5).get("position", torch.full((3, 2), -1.0)) for seed in range(400)])
    assert torch.equal(places, places[:, :1].expand_as(places)), "one table of positions serves the whole batch"
    moved = places[places[:, 0, 0] >= 0, 0]
    assert 150 < len(moved) < 250
    assert moved.min() >= 0 and moved.max() < 1 and abs(moved.mean() - 0.5) < 0.08


def test_gradients_reach_the_encoders_that_are_not_dropped() -> None:
    features = conditioning(1)
    features["lg_out"].requires_grad_()
    variation = Variation(1.0, 0.0, 0.0, 0.0, L, 2 * L)
    variation(features, torch.Generator().manual_seed(1))["lg_out"].sum().backward()
    assert features["lg_out"].grad is not None
    assert features["lg_out"].grad[0, 0].tolist() == [0.0] * L + [1.0] * G
