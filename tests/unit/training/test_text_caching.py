"""Several processes share what text encoders make of captions."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from library.architectures.interface import TextCacheSpec
from library.options.text_caching import TextCachingOptions
from library.processes import Processes
from library.training.text_caching import RunText, prepare_text
from library.types import Conditioning
from tests.unit.data.builders import batches_of, open_set, options_of, write_folder


class Words:
    """Features that say how long a caption is; slow enough for another process to come too early."""

    def tokenize(self, captions: Sequence[str]) -> Any:
        return list(captions)

    def encode(self, encoders: Sequence[nn.Module], captions: Sequence[str]) -> Conditioning:
        time.sleep(0.02)
        return {"length": torch.tensor([[float(len(caption))] for caption in captions])}


class Board:
    """The key-value store of processes, among threads."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


def prepare(folder: Path, to_disk: bool, processes: Processes, loads: list[int]) -> tuple[RunText, list[Any]]:
    """What one process has: its text encoders, and the captions and features of its batches."""
    options = options_of("--resolution 64 --caption_extension .txt", "--train_data_dir", str(folder))
    training_set = open_set(options)
    training_set.fix_captions(8)

    def load() -> list[nn.Module]:
        loads.append(processes.rank)
        return [nn.Identity()]

    wanted = TextCachingOptions(cache_text_encoder_outputs=True, cache_text_encoder_outputs_to_disk=to_disk)
    spec = TextCacheSpec(wanted, "_words_te.npz", ("length",), lambda: "words")
    parts = SimpleNamespace(
        text=Words(), preview=SimpleNamespace(text=Words()), text_cache=spec, load=SimpleNamespace(text_encoders=load)
    )
    arch: Any = parts
    text = prepare_text(options, arch, training_set, torch.device("cpu"), nullcontext, [], processes)
    batches = [(b.captions, (b.conditioning or {})["length"].tolist()) for b in batches_of(training_set)]
    return text, batches


def run_three(folder: Path, to_disk: bool) -> tuple[list[tuple[RunText, list[Any]]], list[int]]:
    board, loads = Board(), []
    with ThreadPoolExecutor(3) as pool:
        ranks = [Processes(rank=rank, count=3, store=board) for rank in (2, 1, 0)]
        return list(pool.map(lambda processes: prepare(folder, to_disk, processes, loads), ranks)), loads


def test_on_disk_one_process_encodes_and_the_others_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "1_a", 5)
    found, loads = run_three(tmp_path, to_disk=True)
    assert loads == [0]
    assert all(text.encoders == [] and batches == found[0][1] for text, batches in found)
    for captions, lengths in found[0][1]:
        assert lengths == [[len(caption)] for caption in captions]


def test_in_memory_each_process_has_its_own(tmp_path: Path) -> None:
    write_folder(tmp_path / "1_a", 5)
    found, loads = run_three(tmp_path, to_disk=False)
    assert sorted(loads) == [0, 1, 2]
    assert all(batches == found[0][1] for _, batches in found)
    assert list(tmp_path.rglob("*.npz")) == []
