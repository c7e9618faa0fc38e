"""Z-Image: a transformer of one stream, Qwen3 4B as text encoder, 16-channel latents. See `assembly.py`."""
