"""FLUX.1: a transformer of double and single streams, CLIP-L and T5-XXL, 16-channel latents. See `assembly.py`."""
