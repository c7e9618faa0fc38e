"""Stable Diffusion XL: U-Net of diffusers, two CLIP text encoders, 4-channel latents. See `assembly.py`."""
