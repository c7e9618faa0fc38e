"""SD 1.x: captions, latents, and the view for network modules."""

import shutil

import pytest
import torch

from library.models import tokenizer_files
from library.models.clip.tokenizer import TOKENIZER, load_tokenizer
from library.types import Noised
from tests.tolerances import EXACT, FLOAT32_DEEP, FLOAT32_SAME_MATH


def test_a_caption_is_wrapped_and_padded_with_the_end_token(open_sd, tiny_sd_folder):
    text = open_sd(tiny_sd_folder).text
    begin, end = text.tokenizer.bos_token_id, text.tokenizer.eos_token_id
    (ids_BLT,) = text.tokenize(["red cat", ""]).ids_BLT
    cat, red = text.tokenizer.convert_tokens_to_ids(["cat</w>", "red</w>"])
    assert ids_BLT.shape == (2, 1, 77)
    assert ids_BLT[0, 0].tolist() == [begin, red, cat] + [end] * 74
    assert ids_BLT[1, 0].tolist() == [begin] + [end] * 76


@pytest.mark.parametrize(("max_token_length", "max_tokens"), [(None, 75), (150, 150), (225, 225)])
def test_long_captions_are_counted_in_full_and_truncated_at_the_limit(
    open_sd, tiny_sd_folder, max_token_length, max_tokens
):
    text = open_sd(tiny_sd_folder, max_token_length=max_token_length).text
    caption = " ".join(["cat"] * 400)
    assert (text.max_tokens, text.count_tokens(caption)) == (max_tokens, 400)
    (ids_BLT,) = text.tokenize([caption]).ids_BLT
    cat = text.tokenizer.convert_tokens_to_ids("cat</w>")
    assert ids_BLT.shape == (1, max_tokens // 75, 77)
    assert ids_BLT[0, :, 1:-1].flatten().tolist() == [cat] * max_tokens
    assert set(ids_BLT[0, :, 0].tolist()) == {text.tokenizer.bos_token_id}
    assert set(ids_BLT[0, :, -1].tolist()) == {text.tokenizer.eos_token_id}


def test_emphasis_notation_is_not_counted_as_tokens(open_sd, tiny_sd_folder):
    caption = "(red:1.4) [cat]"
    assert open_sd(tiny_sd_folder, weighted_captions=True).text.count_tokens(caption) == 2
    assert open_sd(tiny_sd_folder).text.count_tokens(caption) > 2


def test_emphasis_follows_its_token_into_the_next_chunk(open_sd, tiny_sd_folder):
    text = open_sd(tiny_sd_folder, weighted_captions=True, max_token_length=150).text
    tokens = text.tokenize([" ".join(["cat"] * 74) + " (red dog:1.5) and"])
    (weights_BLT,) = tokens.weights_BLT
    assert weights_BLT[0, 0].tolist() == [1.0] * 75 + [1.5, 1.0]
    assert weights_BLT[0, 1].tolist() == [1.0, 1.5] + [1.0] * 75


@pytest.mark.parametrize("clip_skip", [None, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_first_layer(open_sd, tiny_sd_folder, clip_skip, checkpointing):
    arch = open_sd(tiny_sd_folder, clip_skip=clip_skip)
    (encoder,) = arch.load.text_encoders()
    if checkpointing:
        encoder.train()
        encoder.gradient_checkpointing_enable()
    weight = encoder.encoder.layers[0].mlp.fc1.weight.requires_grad_(True)
    arch.text.encode([encoder], arch.text.tokenize(["a dog"]))["hidden_state"].square().sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_clip_skip_2_leaves_the_last_layer_out(open_sd, tiny_sd_folder):
    arch = open_sd(tiny_sd_folder, clip_skip=2)
    (encoder,) = arch.load.text_encoders()
    tokens = arch.text.tokenize(["red dog"])
    before = arch.text.encode([encoder], tokens)["hidden_state"]
    encoder.encoder.layers[-1].mlp.fc2.weight.data += 1
    assert torch.equal(arch.text.encode([encoder], tokens)["hidden_state"], before)


def test_the_tokenizer_is_found_in_the_folder_or_next_to_the_file(tiny_sd_folder, tiny_sd_file):
    for model, folder in ((tiny_sd_folder, tiny_sd_folder), (tiny_sd_file, tiny_sd_file.parent)):
        assert load_tokenizer(model, None, 522).name_or_path == str(folder / "tokenizer")


def test_the_tokenizer_is_read_from_the_cache_folder(tiny_sd_file, tmp_path):
    cached = tmp_path / "cache" / "openai_clip-vit-large-patch14"
    cached.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tiny_sd_file.parent / "tokenizer" / name, cached)
    ids = load_tokenizer(tmp_path / "alone.safetensors", str(tmp_path / "cache"), 522)("a red cat")["input_ids"]
    assert ids == load_tokenizer(tiny_sd_file, None, 522)("a red cat")["input_ids"]


def test_a_downloaded_tokenizer_is_kept_in_the_cache_folder(tiny_sd_file, tmp_path, monkeypatch):
    requests = []

    def fetch(name, patterns):
        requests.append(name)
        return tiny_sd_file.parent / "tokenizer"

    monkeypatch.setattr(tokenizer_files, "fetch_snapshot", fetch)
    for _ in range(2):
        load_tokenizer(tmp_path / "alone.safetensors", str(tmp_path / "cache"), 522)
    assert requests == [TOKENIZER.hub_name]


def test_the_error_for_a_missing_tokenizer_says_which_files_to_put_where(tmp_path, monkeypatch):
    def fetch(name, patterns):
        raise ConnectionError("timed out")

    monkeypatch.setattr(tokenizer_files, "fetch_snapshot", fetch)
    with pytest.raises(ValueError, match=r"Put vocab.json and merges.txt") as error:
        load_tokenizer(tmp_path / "alone.safetensors", None, 522)
    message = str(error.value)
    assert str(tmp_path / "tokenizer") in message and "timed out" in message
    assert "<folder>/openai_clip-vit-large-patch14 and give --tokenizer_cache_dir <folder>" in message
    with pytest.raises(ValueError, match=r"Put vocab.json and merges.txt") as error:
        load_tokenizer(tmp_path / "alone.safetensors", str(tmp_path / "kept"), 522)
    assert str(tmp_path / "kept" / "openai_clip-vit-large-patch14") in str(error.value)


def test_a_tokenizer_with_more_tokens_than_the_text_encoder_is_refused(open_sd, tiny_sd_file, tmp_path):
    """A tokenizer/ folder next to a single file may belong to another model."""
    import json

    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_sd_file.parent / "tokenizer", folder)
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocab["<|endoftext|>"] = 60_000
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    shutil.copy(tiny_sd_file, tmp_path)
    with pytest.raises(ValueError, match=r"has token IDs up to 60000, but CLIP has 522 embeddings"):
        open_sd(tmp_path / tiny_sd_file.name)


# Latents are sampled from the VAE's posterior, each with its own generator.


@pytest.fixture
def pixels_BCHW() -> torch.Tensor:
    return torch.rand(3, 3, 64, 128, generator=torch.Generator().manual_seed(41)) * 2 - 1


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_latent_is_the_mean_plus_deviation_times_its_own_noise(open_sd, tiny_sd_folder, pixels_BCHW):
    arch = open_sd(tiny_sd_folder)
    vae = arch.load.vae()
    actual_BCHW = arch.codec.encode(vae, pixels_BCHW, generators(3, 4, 5))
    posterior = vae.encode(pixels_BCHW).latent_dist
    for b, seed in enumerate((3, 4, 5)):
        noise_CHW = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(seed))
        expected_CHW = posterior.mean[b] + torch.exp(0.5 * posterior.logvar[b]) * noise_CHW
        torch.testing.assert_close(actual_BCHW[b], expected_CHW, **FLOAT32_SAME_MATH)


def test_a_latent_does_not_depend_on_the_rest_of_its_batch(open_sd, tiny_sd_folder, pixels_BCHW):
    arch = open_sd(tiny_sd_folder)
    vae = arch.load.vae()
    together = arch.codec.encode(vae, pixels_BCHW, generators(6, 7, 8))[1:2]
    alone = arch.codec.encode(vae, pixels_BCHW[1:2], generators(7))
    torch.testing.assert_close(together, alone, **FLOAT32_DEEP)


def test_decoding_undoes_scaling(open_sd, tiny_sd_folder):
    arch = open_sd(tiny_sd_folder)
    vae = arch.load.vae()
    latents_BCHW = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(42))
    assert torch.equal(arch.codec.normalize(latents_BCHW), latents_BCHW * 0.18215)
    decoded = arch.codec.decode(vae, arch.codec.normalize(latents_BCHW))
    torch.testing.assert_close(decoded, vae.decode(latents_BCHW).sample, **FLOAT32_DEEP)


def test_a_half_precision_vae_returns_float32(open_sd, tiny_sd_folder, pixels_BCHW):
    arch = open_sd(tiny_sd_folder, "bf16")
    vae = arch.load.vae()
    latents_BCHW = arch.codec.encode(vae, pixels_BCHW, generators(1, 2, 3))
    assert latents_BCHW.dtype == torch.float32
    assert arch.codec.decode(vae, latents_BCHW).dtype == torch.float32
    full = open_sd(tiny_sd_folder)
    expected = full.codec.encode(full.load.vae(), pixels_BCHW, generators(1, 2, 3))
    torch.testing.assert_close(latents_BCHW, expected, rtol=0.1, atol=0.1)


def test_the_cache_uses_the_file_suffix_and_keys_of_sd_scripts(open_sd, tiny_sd_folder):
    spec = open_sd(tiny_sd_folder).codec.spec
    assert (spec.cache_suffix, spec.had_keys_without_size) == ("_sd.npz", True)
    assert (spec.channels, spec.downscale, spec.bucket_step) == (4, 8, 64)


def test_encoding_is_deterministic(open_sd, tiny_sd_folder, pixels_BCHW):
    arch = open_sd(tiny_sd_folder)
    vae = arch.load.vae()
    first, second = (arch.codec.encode(vae, pixels_BCHW, generators(1, 2, 3)) for _ in range(2))
    torch.testing.assert_close(first, second, **EXACT)


# The view of SD 1.x for network modules: names as in adapter files, and the models' own layers.


def test_text_encoder_paths_begin_with_text_model_in_every_transformers_version(open_sd, tiny_sd_folder):
    arch = open_sd(tiny_sd_folder)
    (encoder,) = arch.load.text_encoders()
    text_view, _ = arch.view([encoder], arch.load.denoiser())
    paths = {name for name, _ in text_view.named_parameters()}
    assert all(path.startswith("text_model.") for path in paths)
    assert "text_model.encoder.layers.1.self_attn.q_proj.weight" in paths
    assert {id(p) for p in text_view.parameters()} == {id(p) for p in encoder.parameters()}


def test_a_forward_replaced_through_the_view_affects_the_models(open_sd, tiny_sd_folder):
    arch = open_sd(tiny_sd_folder)
    encoders, unet = arch.load.text_encoders(), arch.load.denoiser()
    text_view, unet_view = arch.view(encoders, unet)
    tokens = arch.text.tokenize(["red dog"])
    latents_BCHW = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(61))
    noised = Noised(latents_BCHW, latents_BCHW, latents_BCHW, torch.ones(1), torch.tensor([500]))
    text = arch.text.encode(encoders, tokens)
    prediction = arch.predict(unet, noised, text, None)
    for layer in (
        text_view.get_submodule("text_model.encoder.layers.0.mlp.fc1"),
        unet_view.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_k"),
    ):
        original = layer.forward
        layer.forward = lambda x, original=original: original(x) + torch.linspace(-3, 3, original(x).shape[-1])
    changed = arch.text.encode(encoders, tokens)
    assert not torch.allclose(changed["hidden_state"], text["hidden_state"])
    assert not torch.allclose(arch.predict(unet, noised, text, None), prediction)


def test_adapter_targets_do_not_change_the_state_dict(open_sd, tiny_sd_folder):
    arch = open_sd(tiny_sd_folder)
    unet = arch.load.denoiser()
    names = list(unet.state_dict())
    _, unet_view = arch.view(arch.load.text_encoders(), unet)
    assert unet_view.adapter_targets.denoiser.prefix == "lora_unet"
    assert [part.prefix for part in unet_view.adapter_targets.text_encoders] == ["lora_te"]
    assert list(unet.state_dict()) == names
