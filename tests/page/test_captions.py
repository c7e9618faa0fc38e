"""Captions that the captioner writes, which replace none of the user's."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from library.page.jobs import Trainings
from library.page.live import Live
from library.page.store import Choice, Draft, Store
from library.page.worker import write_captions
from library.train_photos import captioner
from tests.running import make_images


def test_missing_captions_are_written_for_photos_below_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(tmp_path / "photos", 2)
    make_images(tmp_path / "private", 1)
    said: list[dict[str, Any]] = []

    def describe(photos: Sequence[Path]) -> Iterator[tuple[Path, str]]:
        yield from ((path, f"a {path.stem}") for path in photos)

    monkeypatch.setattr(captioner, "describe_photos", describe)
    inputs = {"root": str(tmp_path / "photos"), "photos": ["00.png", "01.png", "../private/00.png"]}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found = write_captions(inputs, lambda **values: said.append(values))
    assert found == {"captions": {"00.png": "a 00", "01.png": "a 01"}}
    assert said == [{"done": n, "total": 2} for n in range(3)]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_captions_of_the_user_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.create()
    live = Live(store, Trainings(store))
    captions = {"a.png": "", "b.png": "beside the photo", "c.png": "", "d.png": "", "e.png": ""}
    photos = [{"name": name, "caption": caption, "problems": []} for name, caption in captions.items()]
    draft = Draft(str(tmp_path), choices={"c.png": Choice(is_out=True), "d.png": Choice(caption="typed")})
    live.save(draft)
    store.write(draft.id, "photos.json", {"folders": [{"path": "", "photos": photos, "left_out": []}], "trigger": "x"})
    begun: list[Any] = []
    monkeypatch.setattr(live.tasks, "begin", lambda *words: begun.append(words))
    live.write_captions(draft)
    ((_, task, inputs, finish),) = begun
    assert (task, inputs["photos"]) == ("captions", ["a.png", "e.png"])
    live.save(draft.change_photo("e.png", caption="typed meanwhile"))
    finish({"captions": {"a.png": "a cat", "e.png": "a dog", "b.png": "not asked for"}})
    now = live.drafts[draft.id]
    assert [now.caption_of(photo) for photo in photos] == ["a cat", "beside the photo", "", "typed", "typed meanwhile"]
