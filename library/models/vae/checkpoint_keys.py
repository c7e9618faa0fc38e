"""Names of VAE weights: Stability's single-file layout ("ldm") and the module paths of diffusers.

All functions transform names only and work for any number of levels and layers.
"""

import re

from library.models.names import inverse, swap_stem

VAE_PREFIX = "first_stage_model."
VAE_PREFIXES = ("vae.", VAE_PREFIX, "")  # of VAEs in separate files, or in files with other models
VAE_MID = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
VAE_ATTENTION_2022 = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.12


def vae_from_ldm(key: str, num_levels: int) -> str:
    """Return diffusers' name of a VAE weight; `key` without "first_stage_model."."""
    match = re.fullmatch(r"(encoder|decoder)\.mid\.(block_1|attn_1|block_2)\.(.+)", key)
    if match:
        tail = swap_stem(match[3], VAE_ATTENTION) or match[3] if match[2] == "attn_1" else match[3]
        return f"{match[1]}.mid_block.{VAE_MID[match[2]]}.{tail.replace('nin_shortcut', 'conv_shortcut')}"
    match = re.fullmatch(r"(encoder|decoder)\.norm_out\.(.+)", key)
    if match:
        return f"{match[1]}.conv_norm_out.{match[2]}"
    match = re.fullmatch(r"(?:encoder\.(down)|decoder\.(up))\.(\d+)\.(block\.(\d+)|downsample|upsample)\.(.+)", key)
    if match is None:
        return key
    down, level, kind, layer, tail = match[1], int(match[3]), match[4], match[5], match[6]
    # Stability numbers the decoder's levels from the finest, diffusers from the coarsest.
    stem = f"encoder.down_blocks.{level}" if down else f"decoder.up_blocks.{num_levels - 1 - level}"
    if layer is None:
        return f"{stem}.{kind}rs.0.{tail}"
    return f"{stem}.resnets.{layer}.{tail.replace('nin_shortcut', 'conv_shortcut')}"


def vae_to_ldm(key: str, num_levels: int) -> str:
    """Invert `vae_from_ldm`."""
    match = re.fullmatch(r"(encoder|decoder)\.mid_block\.((?:resnets|attentions)\.\d+)\.(.+)", key)
    if match:
        kind = inverse(VAE_MID)[match[2]]
        tail = swap_stem(match[3], inverse(VAE_ATTENTION)) or match[3] if kind == "attn_1" else match[3]
        return f"{match[1]}.mid.{kind}.{tail.replace('conv_shortcut', 'nin_shortcut')}"
    match = re.fullmatch(r"(encoder|decoder)\.conv_norm_out\.(.+)", key)
    if match:
        return f"{match[1]}.norm_out.{match[2]}"
    pattern = r"(?:encoder\.(down)_blocks|decoder\.(up)_blocks)\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)"
    match = re.fullmatch(pattern, key)
    if match is None:
        return key
    down, level, kind, layer, tail = match[1], int(match[3]), match[4], match[5], match[6]
    stem = f"encoder.down.{level}" if down else f"decoder.up.{num_levels - 1 - level}"
    if kind == "resnets":
        return f"{stem}.block.{layer}.{tail.replace('conv_shortcut', 'nin_shortcut')}"
    return f"{stem}.{kind.removesuffix('rs')}.{tail}"


def vae_from_old_diffusers(key: str) -> str:
    """Rename attention weights of VAEs saved by diffusers before 0.12 to the current names."""
    match = re.fullmatch(r"(.+\.mid_block\.attentions\.\d+)\.(.+)", key)
    return f"{match[1]}.{swap_stem(match[2], VAE_ATTENTION_2022) or match[2]}" if match else key
