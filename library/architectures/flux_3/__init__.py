"""FLUX.3 Image Klein: a transformer, Qwen3-VL 4B as text encoder, FLUX.2's latents. See `assembly.py`."""
