"""Stable Diffusion XL: diffusers' U-Net, two CLIP text encoders, 4-channel latents. See `assembly.py`."""
