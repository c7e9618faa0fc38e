"""Stable Diffusion 1.x and 2.x: diffusers' U-Net, one CLIP text encoder, 4-channel latents. See `assembly.py`."""
