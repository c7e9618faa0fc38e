"""The files of Z-Image: three files, one file with everything, or a diffusers folder."""

from functools import partial

from library.architectures.specs import list_specs
from library.architectures.zimage.layers import DIFFUSERS_MARK, KEYS, MARK
from library.architectures.zimage.model import PATCH, ZImage, read_config
from library.models.language_model_dit import VAE_FLAG, DitFiles, open_models
from library.models.qwen3 import qwen3_encoder
from library.models.transformer_file import TransformerFile
from library.models.vae.flux import CHANNELS, open_ae
from library.models.vae.vae import TransformerVae, load_vae

FILES = DitFiles(
    TransformerFile(
        base="zimage",
        title="Z-Image",
        architecture="Z-Image",
        mark=MARK,
        diffusers_mark=DIFFUSERS_MARK,
        **KEYS.of_file,
        build=ZImage,
        read_config=read_config,
        unused=("norm_final.weight",),
    ),
    encoder=qwen3_encoder("4B"),
    vae=TransformerVae(partial(open_ae, flag=VAE_FLAG), load_vae, CHANNELS * PATCH**2, "patch"),
    list_specs=list_specs,
    fp8="fp8_llm",
)
open_loader = partial(open_models, FILES)
