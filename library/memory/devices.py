"""Giving memory back between the stages of a run."""

import gc

import torch


def release_memory(keep_cache: bool = False) -> None:
    """Collect what is unreferenced; `keep_cache` (--highvram) leaves the card's cached blocks with torch."""
    gc.collect()
    if not keep_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
