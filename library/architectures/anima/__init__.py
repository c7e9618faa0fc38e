"""Anima: a Cosmos-Predict2 transformer that reads Qwen3's states through an adapter of T5 words."""
