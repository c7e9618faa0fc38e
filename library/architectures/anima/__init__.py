"""Anima: Cosmos-Predict2's transformer, a text adapter from Qwen3 to T5 tokens, and Qwen-Image's VAE. See
`assembly.py`."""
