"""What is given back between the stages of a run."""

import pytest
import torch

from library.memory.devices import release_memory

BACKENDS = {"cuda": "torch.cuda", "mps": "torch.mps"}


@pytest.mark.parametrize("there", [*BACKENDS, None])
def test_the_cache_of_the_card_that_is_there_is_emptied(monkeypatch: pytest.MonkeyPatch, there: str | None) -> None:
    emptied: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there == "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there == "mps")
    for name, module in BACKENDS.items():
        monkeypatch.setattr(f"{module}.empty_cache", lambda name=name: emptied.append(name))
    release_memory(keep_cache=True)
    assert emptied == []
    release_memory()
    assert emptied == ([there] if there else [])
