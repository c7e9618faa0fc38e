"""FLUX.3 Image Klein: a transformer of a stream for each kind of token, then one stream, Qwen3-VL 4B as text encoder,
FLUX.2's latents. See `assembly.py`."""
