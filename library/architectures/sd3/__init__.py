"""Stable Diffusion 3 and 3.5: our own MMDiT, two CLIP text encoders and T5, 16-channel latents. See `assembly.py`."""
