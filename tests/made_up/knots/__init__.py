"""Knots: a made-up base model of two blocks, bytes for text, and the VAE of Stable Diffusion. See `assembly.py`.

It shows the cost of a new base model: this package and a script, without other changes to the project.
"""
