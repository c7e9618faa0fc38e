"""The files of MOSS-Image: three files, one file with everything, or a diffusers folder."""

from functools import partial

from library.architectures.moss_image.layers import FUSED, PARTS, denoiser_module, is_linear
from library.architectures.moss_image.model import MossImage, read_config
from library.architectures.moss_image.qwen3_5 import ENCODER
from library.architectures.specs import list_specs
from library.checkpoints.fused_tensors import split_rows
from library.models.language_model_dit import DitFiles, open_models
from library.models.transformer_file import TransformerFile
from library.models.vae.flux_2 import PACKED_VAE

FILES = DitFiles(
    TransformerFile(
        base="moss_image",
        title="MOSS-Image",
        architecture="MOSS-Image",
        mark="shared_block_modulation.weight",
        diffusers_mark=None,
        is_layer=is_linear,
        name=denoiser_module,
        build=MossImage,
        read_config=read_config,
        split_fused=partial(split_rows, fused=FUSED, parts=PARTS),
        unused=("rope.bands",),  # it is computed instead
    ),
    encoder=ENCODER,
    vae=PACKED_VAE,
    list_specs=list_specs,
)
open_loader = partial(open_models, FILES)
