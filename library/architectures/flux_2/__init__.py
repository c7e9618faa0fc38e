"""FLUX.2: a transformer of double and single streams, Qwen3 or Mistral 3 as text encoder, 128-channel latents. See
`assembly.py`."""
