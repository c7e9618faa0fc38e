"""Knots: a made-up base model of two blocks, bytes for text, and the VAE of Stable Diffusion. See `assembly.py`.

Nobody has it. It shows what a base model costs: this package and a script, and nothing else in the project is touched.
"""
