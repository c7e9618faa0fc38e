"""When Python's garbage collector looks at what."""

import gc

import pytest

from library.collector import freeze_imports, keep_imported, pause_collection


def test_the_collector_stays_away_from_imports_and_comes_back_whatever_happens() -> None:
    assert gc.isenabled()
    with pytest.raises(ImportError), pause_collection():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    keep_imported.cache_clear()
    with freeze_imports("this"):
        assert not gc.isenabled()
    assert gc.isenabled()
    count = gc.get_freeze_count()
    kept = [[] for _ in range(50)]  # type: ignore[var-annotated]
    with freeze_imports("this"):
        pass
    # What was kept may go, one by one, when nothing refers to it any more: the count falls then, but it never grows.
    assert len(kept) < gc.get_freeze_count() <= count, "only once in a process"
