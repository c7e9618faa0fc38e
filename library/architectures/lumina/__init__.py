"""Lumina Image 2.0: a transformer of one stream, Gemma 2 as text encoder, 16-channel latents. See `assembly.py`."""
