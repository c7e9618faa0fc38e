"""Cached text features: variants of captions, files compatible with sd-scripts, and staleness."""

import dataclasses
import io
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from library.base.errors import NotThere, UserError
from library.data.caching.captions import CachedTexts, Encoders, TextEncoding, cache_texts
from library.data.caching.text_files import TOKEN_STEP, TextFile, stack_rows
from library.data.decoding import npz
from library.data.description.captions import CaptionRules, caption_variant
from library.data.plan.data_plan import DataPlan
from library.data.training_data import TrainingBatches, open_batches
from library.options.caching import TextCachingOptions
from library.processes.process_group import ALONE, Processes
from library.protocols import TextCacheSpec
from library.types import Conditioning
from tests.unit.data.builders import batches_of, options_of, plan_of, write_folder, write_image
from tests.unit.test_processes import Board

KEYS = ("hidden", "pooled", "mask")
MEMORY = TextCachingOptions(cache_text_encoder_outputs=True)
DISK = TextCachingOptions(cache_text_encoder_outputs=True, cache_text_encoder_outputs_to_disk=True)
SHUFFLED = "--shuffle_caption --caption_dropout_rate 0.3"


def features(caption: str, is_prompt: bool = False) -> dict[str, Tensor]:
    """Return features that are unique to a caption, the first in bfloat16."""
    generator = torch.Generator().manual_seed(int.from_bytes(caption.encode()[-7:], "big") + is_prompt)
    return {
        "hidden": torch.randn(5, 3, generator=generator).bfloat16(),
        "pooled": torch.randn(4, generator=generator),
        "mask": torch.arange(5) < len(caption) % 5,
    }


def pipeline(calls: list[list[str]], is_prompt: bool = False) -> Callable[[Sequence[str]], Conditioning]:
    def encode(captions: Sequence[str]) -> Conditioning:
        calls.append(list(captions))
        rows = [features(caption, is_prompt) for caption in captions]
        return {key: torch.stack([row[key] for row in rows]) for key in KEYS}

    return encode


def write_data(
    folder: Path, caption: str = "one, two, three, four, five, six, seven, eight, nine", count: int = 3
) -> Path:
    write_folder(folder / "2_a", count, caption=caption)
    return folder


@dataclasses.dataclass
class Cached:
    plan: DataPlan
    batches: TrainingBatches
    texts: CachedTexts
    calls: list[list[str]]
    num_loads: int

    @property
    def encoded(self) -> list[str]:
        return [text for call in self.calls for text in call]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """The interface of a tokenizer that the cache uses."""

    words: str

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words.split())}


def cache(
    folder: Path,
    arguments: str = "",
    options: TextCachingOptions = DISK,
    prompts: Sequence[str] = (),
    identity: str | None = "encoders",  # None if their files do not exist
    words: str = "a cat",
    constants: Mapping[str, Tensor] | None = None,
    seed: int = 1,
    skips_check: bool = False,
    dtype: str = "bf16",
    settings: str = "",
    encode: Callable[[Sequence[str]], Conditioning] | None = None,
    processes: Processes = ALONE,
    **spec_values: Any,
) -> Cached:
    line = f"--resolution 64 --train_batch_size 2 --caption_extension .txt {arguments}"
    plan = plan_of(options_of(line, "--train_data_dir", str(folder)), seed=seed)
    plan = plan.with_fixed_captions(options.text_cache_variants)
    calls: list[list[str]] = []
    loads: list[int] = []

    def encoders() -> str:
        if identity is None:
            raise NotThere("--t5xxl x does not exist")
        return identity

    spec = TextCacheSpec(
        options,
        "_tiny_te.npz",
        KEYS,
        encoders,
        settings,
        (Tokenizer(words),),
        constants or {"applies": torch.tensor(True)},
        **spec_values,
    )

    def load() -> Encoders:
        encoders()
        loads.append(1)
        return Encoders(encode or pipeline(calls), pipeline(calls, is_prompt=True))

    cached_texts = cache_texts(plan, TextEncoding(spec, load, dtype), prompts, skips_check, processes)
    return Cached(plan, open_batches(plan, texts=cached_texts.store), cached_texts, calls, len(loads))


def draws_of(batches: TrainingBatches, epochs: int = 1, workers: int = 0) -> list[tuple[str, str, dict[str, Tensor]]]:
    """Return (image, caption, features) of every draw."""
    draws = []
    for epoch in range(1, epochs + 1):
        for batch in batches_of(batches, epoch, workers=workers):
            assert batch.conditioning is not None
            for place, (key, caption) in enumerate(zip(batch.keys, batch.captions, strict=True)):
                draws.append((key, caption, {name: tensor[place] for name, tensor in batch.conditioning.items()}))
    return draws


def assert_same_features(row: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name in KEYS:
        assert row[name].dtype == expected[name].dtype and torch.equal(row[name], expected[name]), name


def file_of(folder: Path, name: str = "p0") -> Path:
    return folder / "2_a" / f"{name}_tiny_te.npz"


# Variants of captions


def test_a_caption_variant_depends_only_on_names_and_number():
    rules = CaptionRules(shuffle_caption=True)
    text = ", ".join("abcdefgh")
    versions = [caption_variant("/x/cats/p.png", text, rules, v) for v in range(8)]
    assert len(set(versions)) > 4 and {tuple(sorted(version)) for version in versions} == {tuple(sorted(text))}
    assert versions == [caption_variant("/elsewhere/cats/p.jpg", text, rules, v) for v in range(8)]
    for other in ("/x/cats/q.png", "/x/dogs/p.png"):
        assert versions != [caption_variant(other, text, rules, v) for v in range(8)]


def test_draws_use_every_variant_and_the_empty_prompt_only(tmp_path):
    cached = cache(write_data(tmp_path), SHUFFLED, MEMORY)
    allowed = dict(zip((s.image.key for s in cached.plan.samples), cached.plan.caption_texts(), strict=True))
    drawn: dict[str, set[str]] = {path: set() for path in allowed}
    for key, caption, row in draws_of(cached.batches, epochs=40):
        drawn[key].add(caption)
        assert_same_features(row, features(caption))
    for path, texts in allowed.items():
        assert len(texts) == 8 and drawn[path] == {*texts, ""}
    num_empty = sum(caption == "" for _, caption, _ in draws_of(cached.batches, epochs=40))
    assert abs(num_empty / 240 - 0.3) < 0.09  # three standard deviations of 240 draws


def test_constant_captions_are_drawn_as_without_caching(tmp_path):
    """Captions are equal and dropped in the same draws, and each is encoded once."""
    arguments = "--caption_dropout_rate 0.4 --caption_dropout_every_n_epochs 3"
    cached = cache(write_data(tmp_path), arguments, MEMORY)
    plain = plan_of(
        options_of(
            f"--resolution 64 --train_batch_size 2 --caption_extension .txt {arguments}",
            "--train_data_dir",
            str(tmp_path),
        )
    )
    for epoch in range(1, 4):
        with_cache = [batch.captions for batch in batches_of(cached.batches, epoch)]
        assert with_cache == [batch.captions for batch in batches_of(plain, epoch)]
    assert all(caption == "" for captions in with_cache for caption in captions)
    assert len(cached.encoded) == len(set(cached.encoded)) == 4


def test_variants_include_wildcards_prefix_and_tag_dropout(tmp_path):
    folder = write_data(tmp_path, caption="{red|blue} cat, x, y")
    cached = cache(folder, "--enable_wildcard --caption_tag_dropout_rate 0.5 --caption_prefix photo", MEMORY)
    texts = [text for texts in cached.plan.caption_texts() for text in texts]
    assert {"photo red cat" in text for text in texts} == {True, False}
    assert not any("{" in text for text in texts) and len(set(texts)) > 6


def test_the_seed_affects_the_drawn_variants_but_not_the_cache(tmp_path):
    folder = write_data(tmp_path)
    first = cache(folder, SHUFFLED, seed=1)
    second = cache(folder, SHUFFLED, seed=2)
    assert second.num_loads == 0
    draws = [[caption for _, caption, _ in draws_of(cached.batches)] for cached in (first, second)]
    assert sorted(draws[0]) != sorted(draws[1])


def test_cache_dir_holds_captions_of_local_images_and_files_beside_them_are_read_first(tmp_path: Path) -> None:
    folder, place = write_data(tmp_path / "data"), tmp_path / "my caches"

    def count_encoded() -> int:
        calls: list[list[str]] = []
        words = ("--cache_dir", str(place), "--train_data_dir", str(folder))
        plan = plan_of(
            options_of("--resolution 64 --shuffle_caption --caption_extension .txt", *words)
        ).with_fixed_captions(8)
        spec = TextCacheSpec(DISK, "_te.npz", KEYS, lambda: "encoders", "", (Tokenizer("a"),))
        encoding = TextEncoding(spec, lambda: Encoders(pipeline(calls), pipeline(calls, True)), "bf16")
        cached = cache_texts(plan, encoding, ["a prompt"], False)
        batches_of(open_batches(plan, texts=cached.store))
        return sum(map(len, calls))

    assert [count_encoded(), count_encoded()] == [3 * 8 + 2, 0]
    files = sorted(place.rglob("*.npz"))
    assert len(files) == 5 and not list(folder.rglob("*.npz"))
    for path in files:
        path.rename(folder / "2_a" / path.name)
    assert count_encoded() == 0 and not list(place.rglob("*.npz"))
    (folder / "2_a/p1.txt").write_text("one, two")
    before = (folder / "2_a/p1_te.npz").read_bytes()
    assert [count_encoded(), count_encoded()] == [2, 0]
    assert (folder / "2_a/p1_te.npz").read_bytes() == before and len(list(place.rglob("*.npz"))) == 1


@pytest.mark.parametrize("options", [MEMORY, DISK], ids=["memory", "disk"])
def test_workers_do_not_change_the_draws(tmp_path, options):
    cached = cache(write_data(tmp_path), SHUFFLED, options)
    alone, shared = draws_of(cached.batches, 2), draws_of(cached.batches, 2, workers=2)
    for (key, caption, row), (key2, caption2, row2) in zip(alone, shared, strict=True):
        assert (key, caption) == (key2, caption2)
        assert_same_features(row, row2)
        assert_same_features(row, features(caption))


def test_tag_warm_up_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"2_a.*--token_warmup_step changes captions in every step.*remove one"):
        cache(write_data(tmp_path), "--token_warmup_step 10")


# Files on disk


def test_files_have_the_layout_of_sd_scripts_plus_variants(tmp_path):
    folder = write_data(tmp_path)
    cached = cache(folder, SHUFFLED)
    first, *others = next(cached.plan.caption_texts())
    with np.load(file_of(folder), allow_pickle=False) as archive:
        assert archive["hidden"].dtype == np.float32 and archive["hidden"].shape == (5, 3)
        assert archive["mask"].dtype == bool and archive["applies"].shape == () and bool(archive["applies"])
        np.testing.assert_array_equal(archive["hidden"], features(first)["hidden"].float().numpy())
        np.testing.assert_array_equal(archive["pooled"], features(first)["pooled"].numpy())
        assert archive["hidden_variant1"].dtype == np.uint16
        np.testing.assert_array_equal(archive["pooled_variant7"], features(others[6])["pooled"].numpy())
    assert sorted(path.name for path in (folder / "2_a").glob("*.npz")) == [
        ".empty_prompt_tiny_te.npz",
        *(f"p{i}_tiny_te.npz" for i in range(3)),
    ]


def test_features_survive_a_round_trip_bit_for_bit(tmp_path):
    folder = write_data(tmp_path)
    cached = cache(folder, SHUFFLED, prompts=["a prompt", "no"])
    texts = next(cached.plan.caption_texts())
    for text in texts:
        assert_same_features(TextFile(str(file_of(folder)), KEYS).read(text), features(text))
    assert list(cached.texts.store.memory) == [""] and list(cached.texts.prompts) == ["a prompt", "no"]
    assert_same_features(cached.texts.store.memory[""], features(""))
    assert_same_features(cached.texts.prompts["no"], features("no", is_prompt=True))


def test_a_second_run_loads_no_encoders(tmp_path):
    folder = write_data(tmp_path)
    first = cache(folder, SHUFFLED, prompts=["a prompt"])
    again = cache(folder, SHUFFLED, prompts=["a prompt"])
    assert (first.num_loads, again.num_loads) == (1, 0)
    assert len(first.encoded) == 3 * 8 + 2
    for (_, caption, row), (_, caption2, row2) in zip(draws_of(first.batches), draws_of(again.batches), strict=True):
        assert caption == caption2
        assert_same_features(row, row2)
    assert list(again.texts.prompts) == ["a prompt"]


def test_only_changed_captions_are_encoded_again(tmp_path, caplog):
    folder = write_data(tmp_path)
    cache(folder)
    (folder / "2_a/p1.txt").write_text("another")
    with caplog.at_level(logging.WARNING):
        again = cache(folder)
    assert again.encoded == ["another"]
    assert "text cache: 3 files reused, 0 to encode, 1 stale (1 made for other captions:" in caplog.text
    assert "p1_tiny_te.npz" in caplog.text
    for key, caption, row in draws_of(again.batches):
        assert (caption == "another") == key.endswith("p1.png")
        assert_same_features(row, features(caption))


@pytest.mark.parametrize(
    "change",
    [{"identity": "others"}, {"dtype": "no"}, {"constants": {"applies": torch.tensor(False)}}],
    ids=["encoders", "dtype", "settings"],
)
def test_other_encoders_or_settings_invalidate_the_whole_cache(tmp_path, caplog, change: dict[str, Any]):
    folder = write_data(tmp_path)
    cache(folder)
    with caplog.at_level(logging.WARNING):
        again = cache(folder, **change)
    assert len(again.encoded) == 4 and "4 made with other text encoders or settings" in caplog.text
    assert cache(folder, **change).num_loads == 0


def test_another_tokenizer_invalidates_the_whole_cache(tmp_path, caplog):
    folder = write_data(tmp_path)
    cache(folder)
    with caplog.at_level(logging.WARNING):
        again = cache(folder, words="cat a")
    assert len(again.encoded) == 4 and "4 made with another tokenizer" in caplog.text
    assert cache(folder, words="cat a").num_loads == 0


def rewrite(path: Path, leaves_note: bool, **changes: np.ndarray) -> None:
    """Rewrite the file as another program would."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files if leaves_note or name != "captions"}
    np.savez(path, **{**arrays, **changes})


def npz_bytes(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def test_skipping_the_check_trusts_files_by_name(tmp_path):
    folder = write_data(tmp_path)
    cache(folder)
    rewrite(file_of(folder), False, pooled=np.full(4, 7, dtype=np.float32))
    trusted = cache(folder, identity="others", skips_check=True)
    assert trusted.num_loads == 0
    pooled = {os.path.basename(key): row["pooled"].tolist() for key, _, row in draws_of(trusted.batches)}
    assert pooled["p0.png"] == [7, 7, 7, 7] and pooled["p1.png"] != [7, 7, 7, 7]


def test_skipping_the_check_does_not_train_complex_features(tmp_path):
    folder = write_data(tmp_path)
    cache(folder)
    rewrite(file_of(folder), True, pooled=np.full(4, 7 + 1j, dtype=np.complex64))
    with pytest.raises(
        ValueError, match=r"p0_tiny_te.*holding pooled of the type complex64, which cannot be converted"
    ):
        draws_of(cache(folder, skips_check=True).batches)


def test_skipping_the_check_does_not_train_another_caption(tmp_path):
    folder = write_data(tmp_path)
    cache(folder)
    (folder / "2_a/p1.txt").write_text("another")
    with pytest.raises(ValueError, match=r"p1_tiny_te.npz is without the caption 'another'; run again without --skip"):
        draws_of(cache(folder, skips_check=True).batches)


def test_images_that_differ_only_in_extension_share_a_file(tmp_path):
    folder = write_data(tmp_path, count=1)
    write_image(folder / "2_a/p0.webp", seed=5)
    write_image(folder / "3_b/p0.png", seed=6)
    cached = cache(folder, SHUFFLED)
    assert len(cached.encoded) == len(set(cached.encoded)) == 8 + 2  # the empty prompt and the class word of b
    for _, caption, row in draws_of(cached.batches, 3):
        assert_same_features(row, features(caption))


def test_captions_of_several_images_are_encoded_once(tmp_path):
    for i in range(5):
        write_image(tmp_path / f"1_dog/p{i}.png", seed=i)
    cached = cache(tmp_path)
    assert sorted(cached.encoded) == ["", "dog"]


def test_captions_are_encoded_in_batches_of_the_given_size(tmp_path):
    options = dataclasses.replace(DISK, text_encoder_batch_size=5)
    cached = cache(write_data(tmp_path), "--shuffle_caption", options)
    assert {len(call) for call in cached.calls} <= {1, 2, 3, 4, 5} and max(map(len, cached.calls)) == 5
    for _, caption, row in draws_of(cached.batches):
        assert_same_features(row, features(caption))


def test_the_error_for_an_unwritable_folder_suggests_a_solution(tmp_path, monkeypatch):
    folder = write_data(tmp_path)
    monkeypatch.setattr(npz, "atomic_path", refuse)  # root can write everywhere
    with pytest.raises(ValueError, match=r"_tiny_te.npz cannot be written.*use --cache_text_encoder_outputs to keep"):
        cache(folder)


@contextmanager
def refuse(path):
    raise PermissionError(13, "Permission denied", str(path))
    yield


@pytest.mark.parametrize("options", [MEMORY, DISK], ids=["memory", "disk"])
def test_nan_raises_an_error_that_names_the_caption(tmp_path, options):
    def encode_nan(captions: Sequence[str]) -> Conditioning:
        rows = [features(caption) for caption in captions]
        values = {key: torch.stack([row[key] for row in rows]) for key in KEYS}
        values["pooled"][["five" in caption for caption in captions]] = torch.nan
        return values

    with pytest.raises(ValueError, match=r"NaN \(pooled\) for the caption '.*five.*--mixed_precision"):
        cache(write_data(tmp_path), options=options, encode=encode_nan)
    assert not file_of(tmp_path).exists()


# Batches


def test_shorter_features_are_padded_in_a_batch():
    rows = [
        {"a": torch.ones(n, 3), "m": torch.ones(n), "p": torch.ones(number)} for n, number in ((2, 1), (4, 3), (4, 3))
    ]
    padding = {"a": 0.0, "m": -1.0, "p": -2.0}
    stacked = stack_rows(rows, padding)
    assert stacked["a"].shape == (3, TOKEN_STEP, 3) and stacked["a"].sum((1, 2)).tolist() == [6, 12, 12]
    assert stacked["m"].shape == (3, TOKEN_STEP) and stacked["m"].sum(1).tolist() == [2 - 62, 4 - 60, 4 - 60]
    assert stacked["p"].tolist() == [[1, -2, -2], [1, 1, 1], [1, 1, 1]]
    assert stack_rows(rows[1:], padding)["a"].shape == (2, 4, 3)
    halves = [{"a": torch.ones(1).bfloat16()}, {"a": torch.full((1,), 1 / 3)}]
    assert stack_rows(halves, {})["a"].tolist() == [[1.0], [float(torch.tensor(1 / 3))]], "nothing is rounded"
    full = [{"a": torch.ones(n, 3)} for n in (TOKEN_STEP, 1)]
    assert stack_rows(full, padding={"a": 0.0})["a"].shape == (2, TOKEN_STEP, 3)
    with pytest.raises(RuntimeError):
        stack_rows(rows, {"a": 0.0})


# Several machines


def cache_on_machines(folders: Sequence[Path], options: TextCachingOptions) -> list[Cached]:
    """Return the cache of each of several machines with one process each."""
    board = Board()

    def run(rank: int) -> Cached:
        processes = Processes(rank, len(folders), local_rank=0, local_count=1, store=board)
        return cache(folders[rank], SHUFFLED, options, processes=processes)

    with ThreadPoolExecutor(len(folders)) as pool:
        return list(pool.map(run, range(len(folders))))


@pytest.mark.parametrize("options", [DISK, MEMORY], ids=["disk", "memory"])
def test_machines_with_separate_disks_each_cache_every_caption(tmp_path, options):
    write_data(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for cached in cache_on_machines([tmp_path / "one", tmp_path / "two"], options):
        for _, caption, row in draws_of(cached.batches, epochs=3):
            assert_same_features(row, features(caption))


def test_machines_with_a_shared_disk_divide_the_captions(tmp_path):
    write_data(tmp_path)
    caches = cache_on_machines([tmp_path, tmp_path], DISK)
    alone = cache(write_data(tmp_path / "alone"), SHUFFLED)
    assert sum(len(cached.encoded) for cached in caches) == len(alone.encoded)
    assert all(cached.encoded for cached in caches)


def test_settings_are_checked_even_if_encoders_are_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without encoders, those of the first file count for all; settings and tokenizers are still checked."""
    caplog.set_level(logging.INFO)
    first = cache(write_data(tmp_path), settings="512 tokens")
    same = cache(tmp_path, identity=None, settings="512 tokens")
    assert not same.num_loads and first.num_loads and "(--t5xxl x does not exist)" in caplog.text
    changes: list[dict[str, Any]] = [
        {"settings": "256 tokens"},
        {"words": "b"},
        {"constants": {"applies": torch.tensor(False)}},
    ]
    for changed in changes:
        with pytest.raises(UserError, match=r"captions? must be encoded \(.* is made with (other settings|another)"):
            cache(tmp_path, **{"identity": None, "settings": "512 tokens", **changed})


# Features of different lengths


def test_padding_is_not_stored_but_restored_in_batches(tmp_path):
    """Store one entry per token, whatever the length of the batch; zeros within a caption are kept."""
    texts = ["one", "one two three", ""]
    lengths = [max(len(text.split()), 1) for text in texts]
    for name, text in zip("abc", texts, strict=True):
        write_image(tmp_path / "1_a" / f"{name}.png", (64, 64))
        (tmp_path / "1_a" / f"{name}.txt").write_text(text)

    def encode(captions: Sequence[str]) -> Conditioning:
        counts = [max(len(caption.split()), 1) for caption in captions]
        mask = torch.arange(7)[None] < torch.tensor(counts)[:, None]  # padded beyond the longest
        hidden = (torch.arange(7.0)[:, None] * torch.ones(3)).expand(len(captions), 7, 3) * mask[..., None]
        return {"hidden": hidden.bfloat16(), "pooled": torch.ones(len(captions), 2), "mask": mask.long()}

    batched = TextCachingOptions(True, True, text_encoder_batch_size=3)
    padding = {"hidden": 0.0, "mask": 0.0}
    for options in (batched, dataclasses.replace(batched, cache_text_encoder_outputs_to_disk=False)):
        store = cache(tmp_path, "--caption_dropout_rate 0.5", options, encode=encode, padding=padding).texts.store
        rows = (
            store.memory
            if not options.cache_text_encoder_outputs_to_disk
            else {
                text: TextFile(str(tmp_path / "1_a" / f"{name}_tiny_te.npz"), KEYS).read(text)
                for name, text in zip("ab", texts, strict=False)
            }
        )
        for text, length in zip(texts[:2], lengths, strict=False):
            assert rows[text]["hidden"].shape == (length, 3) and rows[text]["mask"].shape == (length,)
        stacked = stack_rows([rows[text] for text in texts[:2]], padding)
        assert stacked["hidden"].shape == (2, TOKEN_STEP, 3) and stacked["mask"].sum(1).tolist() == [1, 3]


def test_large_features_are_announced_and_stored_as_bfloat16_bits(tmp_path, caplog):
    data = write_data(tmp_path, count=2)
    with caplog.at_level(logging.INFO):
        cache(data, bytes_of=lambda caption: 1_000_000 * len(caption.split()), keeps_bits=True)
    assert "caching text encoder outputs of 3 captions on disk, about 20.0 MB" in caplog.text  # ten words, twice
    with np.load(file_of(data)) as archive:
        assert archive["hidden"].dtype == np.uint16
    read = cache(data, keeps_bits=True)
    assert read.encoded == []
    for _, caption, row in draws_of(read.batches):
        assert_same_features(row, features(caption))
