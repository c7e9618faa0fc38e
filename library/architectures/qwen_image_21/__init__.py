"""Qwen-Image 2.1: a transformer of one stream, Qwen3-VL 8B as text encoder, 64-channel latents of RGBA images. See
`assembly.py`."""
