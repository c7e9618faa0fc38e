"""MOSS-Image: a transformer of one stream, Qwen3.5 9B as text encoder, 128-channel latents. See `assembly.py`."""
