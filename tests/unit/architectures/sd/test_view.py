"""The view of SD 1.x for network modules: names as in adapter files, and the models' own layers."""

import torch

from library.types import Noised


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
