"""Krea 2: a transformer of one stream, Qwen3-VL 4B as text encoder, Qwen-Image's latents. See `assembly.py`."""
