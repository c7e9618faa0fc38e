"""HunyuanImage 2.1: a transformer of double and single streams, Qwen2.5-VL and ByT5, 64-channel latents of 32 pixels.

See `assembly.py`.
"""
