"""Anima: the transformer of Cosmos-Predict2, a text adapter that reads Qwen3 through T5's words, Qwen-Image's VAE.

See `assembly.py`.
"""
