"""Python's garbage collector is paused during imports and always resumed."""

import gc

import pytest

from library.collector import freeze_imports, keep_imported, pause_collection


def test_garbage_collection_is_paused_during_imports_and_always_resumed() -> None:
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
    lists = [[] for _ in range(50)]  # type: ignore[var-annotated]
    with freeze_imports("this"):
        pass
    # Frozen objects may be freed once nothing refers to them: the count can fall, but it never grows.
    assert len(lists) < gc.get_freeze_count() <= count, "only once in a process"
