"""Sharing the outputs of text encoders, and words that no caption teaches."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from library.checkpoints.marks import TRAIN_PY, seal_text
from library.data.training_data import open_batches
from library.options.caching import TextCachingOptions
from library.processes.process_group import Processes
from library.protocols import TextCacheSpec
from library.training.evaluation.untaught_words import caption_texts, find_untaught_words
from library.training.models.text_caching import RunText, TextPlan, prepare_text
from library.training.run import wanted_previews
from library.types import Conditioning
from tests.unit.data.builders import batches_of, options_of, plan_of, write_config, write_folder


def texts_of(options: Any, arch: Any, plan: Any, device: str, processes: Processes) -> RunText:
    text = TextPlan.resolve(options.network, arch.text_cache)
    compute: Any = SimpleNamespace(device=torch.device(device), autocast=nullcontext)
    return prepare_text(text, options.caching, options.precision, arch, plan, compute, [], processes)


class Words:
    """A text encoder whose features are the caption length, slow enough to expose missing synchronisation."""

    def __init__(self, encoded: list[str]) -> None:
        self.encoded = encoded

    def tokenize(self, captions: Sequence[str]) -> Any:
        return list(captions)

    def encode(self, encoders: Sequence[nn.Module], captions: Sequence[str]) -> Conditioning:
        time.sleep(0.02)
        self.encoded += captions
        return {"length": torch.tensor([[float(len(caption))] for caption in captions])}


class Board:
    """A stand-in for the key-value store of processes that threads share."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str) -> bytes:
        while key not in self.values:
            time.sleep(0.01)
        return self.values[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


def prepare(folder: Path, to_disk: bool, processes: Processes, encoded: list[str]) -> tuple[RunText, list[Any]]:
    """Return the text encoders of one process, and the captions and features of its batches."""
    options = options_of("--resolution 64 --caption_extension .txt", "--train_data_dir", str(folder))
    plan = plan_of(options)
    plan = plan.with_fixed_captions(8)

    def load() -> list[nn.Module]:
        return [nn.Identity()]

    caching = TextCachingOptions(cache_text_encoder_outputs=True, cache_text_encoder_outputs_to_disk=to_disk)
    spec = TextCacheSpec(caching, "_words_te.npz", ("length",), lambda: "words", "", tokenizers=())
    parts = SimpleNamespace(
        text=Words(encoded),
        preview=SimpleNamespace(text=Words(encoded)),
        text_cache=spec,
        load=SimpleNamespace(text_encoders=load),
    )
    arch: Any = parts
    text = texts_of(options, arch, plan, "cpu", processes)
    batches = [
        (b.captions, (b.conditioning or {})["length"].tolist())
        for b in batches_of(open_batches(plan, texts=text.store))
    ]
    return text, batches


def run_three(folder: Path, to_disk: bool) -> tuple[list[tuple[RunText, list[Any]]], list[str]]:
    board, encoded = Board(), list[str]()
    with ThreadPoolExecutor(3) as pool:
        ranks = [Processes(rank=r, count=3, local_rank=r, local_count=3, store=board) for r in (2, 1, 0)]
        return list(pool.map(lambda processes: prepare(folder, to_disk, processes, encoded), ranks)), encoded


@pytest.mark.parametrize("to_disk", [True, False])
def test_each_caption_is_encoded_by_one_process_and_used_by_all(tmp_path: Path, to_disk: bool) -> None:
    write_folder(tmp_path / "1_a", 5)
    ranks, encoded = run_three(tmp_path, to_disk)
    assert "" in encoded and len(encoded) == len(set(encoded)) == 6
    assert all(text.encoders == [] and batches == ranks[0][1] for text, batches in ranks)
    for captions, lengths in ranks[0][1]:
        assert lengths == [[len(caption)] for caption in captions]
    assert bool(list(tmp_path.rglob("*.npz"))) == to_disk


@pytest.mark.parametrize(
    ("on_cpu", "adapted", "place"), [(True, False, "cpu"), (False, False, "meta"), (True, True, "meta")]
)
def test_encoders_without_adapters_stay_on_the_cpu_if_requested(
    tmp_path: Path, on_cpu: bool, adapted: bool, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The GPU is the meta device here, which accepts modules like any other device."""
    write_folder(tmp_path / "1_a", 1)
    options = options_of("--resolution 64 --caption_extension .txt", "--train_data_dir", str(tmp_path))
    options = options.with_values({"network_train_unet_only": not adapted})
    spec = TextCacheSpec(TextCachingOptions(text_encoder_cpu=on_cpu), "_te.npz", (), lambda: "", "", tokenizers=())
    load = SimpleNamespace(text_encoders=lambda: [nn.Linear(2, 2)])
    arch: Any = SimpleNamespace(text_cache=spec, load=load)
    text = texts_of(options, arch, plan_of(options), "meta", Processes())
    assert {p.device.type for p in text.encoders[0].parameters()} == {place}
    assert ("--text_encoder_cpu has no effect" in caplog.text) == (on_cpu and adapted)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_encoders_that_fill_a_cache_stay_on_the_cpu_too(tmp_path: Path, on_cpu: bool) -> None:
    write_folder(tmp_path / "1_a", 1)
    options = options_of("--resolution 64 --caption_extension .txt", "--train_data_dir", str(tmp_path))
    plan = plan_of(options)
    plan = plan.with_fixed_captions(8)
    encoder = nn.Linear(2, 2)
    caching = TextCachingOptions(cache_text_encoder_outputs=True, text_encoder_cpu=on_cpu)
    spec = TextCacheSpec(caching, "_words_te.npz", ("length",), lambda: "words", "", tokenizers=())
    arch: Any = SimpleNamespace(
        text=Words([]),
        preview=SimpleNamespace(text=Words([])),
        text_cache=spec,
        load=SimpleNamespace(text_encoders=lambda: [encoder]),
    )
    texts_of(options, arch, plan, "meta", Processes())
    assert encoder.weight.device.type == ("cpu" if on_cpu else "meta")


# Words that preview prompts have and no caption teaches.

VOCABULARY = {"a", "photo", "of", "cat", "dog", "beach"}


def count_tokens(text: str) -> int:
    """Count the marks of start and end, and two tokens for a word outside the vocabulary."""
    return 2 + sum(1 if word in VOCABULARY else 2 for word in text.split())


@pytest.mark.parametrize(
    ("prompts", "captions", "words"),
    [
        (["a photo of mycat, beach", "Mycat asleep"], ["a cat on grass"], ["mycat"]),
        (["a photo of mycat", "mycat asleep"], ["a cat", "MyCat on grass"], []),
        (["a photo of the cat", "the cat asleep"], ["tabby"], ["cat"]),  # "the" is common
        (["a cat", "a dog"], ["tabby"], []),  # no word is in both
        (["mycat at the beach"], ["a cat"], ["mycat"]),  # "beach" needs no caption
        (["mycat at the beach"], ["photo of mycats"], []),
        (["a mycat", "a mycat"], [], ["mycat"]),  # one prompt twice
        ([], ["a cat"], []),
    ],
)
def test_words_of_all_prompts_that_no_caption_has(prompts, captions, words):
    assert find_untaught_words(prompts, captions, count_tokens) == words


def test_prefix_and_class_tokens_count_as_captions_and_regularisation_images_do_not(tmp_path):
    for name in ("own", "reg"):
        write_folder(tmp_path / name, 1, caption=name)
    text = (
        "[[datasets]]\nresolution = 64\ncaption_prefix = 'ohwx'\ncaption_extension = '.txt'\n"
        "[[datasets.subsets]]\nimage_dir = '{here}/own'\nclass_tokens = 'a tabby'\n"
        "[[datasets.subsets]]\nimage_dir = '{here}/reg'\nis_reg = true\n"
    )
    texts = [*caption_texts(plan_of(write_config(tmp_path / "data.toml", text)))]
    assert texts == ["ohwx a tabby", "own 0"]


@pytest.mark.parametrize(
    ("text", "is_judged"),
    [
        (seal_text(TRAIN_PY, "mycat, a cat\n"), False),
        (seal_text(TRAIN_PY, "mycat, a cat\n") + "a word of mine\n", True),
        ("mycat, a cat\n", True),
    ],
)
def test_only_words_of_the_user_are_judged(
    text: str, is_judged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[Any] = []
    for name, value in {
        "read_wanted_prompts": lambda options, arch: ["a prompt"],
        "to_meta_device": lambda load: SimpleNamespace(vae=lambda: None),
        "collect_texts": lambda prompts, arch: [],
        "read_scorer": lambda options, plan: None,
        "warn_of_untaught_words": lambda *arguments: judged.append(arguments),
    }.items():
        monkeypatch.setattr(wanted_previews, name, value)
    (tmp_path / "prompts.txt").write_text(text)
    options: Any = SimpleNamespace(sample_prompts=str(tmp_path / "prompts.txt"))
    thing: Any = SimpleNamespace(load=None, image_plan=None)
    wanted_previews.read_wanted_previews(options, thing, thing)
    assert bool(judged) == is_judged
