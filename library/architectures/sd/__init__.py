"""Stable Diffusion 1.x and 2.x: U-Net of diffusers, one CLIP text encoder, 4-channel latents. See `assembly.py`."""
