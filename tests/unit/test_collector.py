"""Python's garbage collector is paused during imports and always resumed."""

import gc
import subprocess
import sys

import pytest

from library.base.collector import freeze_imports, keep_imported, pause_collection
from tests.running import ROOT


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


IN_A_RUN = """
from library.base.collector import keep_imported
keep_imported("a test")
"""
IN_A_TEST = """
from types import SimpleNamespace
from tests.conftest import freeze_collected
freeze_collected(SimpleNamespace(stash={}))
"""


@pytest.mark.parametrize(
    ("module", "num_kept", "freeze"),
    [("triton", "0", IN_A_RUN), ("trident", "more", IN_A_RUN), ("triton", "0", IN_A_TEST)],
    ids=["run", "run without triton", "pytest"],
)
def test_kept_objects_are_deleted_at_exit_if_triton_is_loaded(module: str, num_kept: str, freeze: str) -> None:
    """Triton reports its objects that are still alive as leaked."""
    code = f"""
import atexit, gc, sys
atexit.register(lambda: print("more" if gc.get_freeze_count() else 0))  # runs last
sys.modules[{module!r}] = sys
{freeze}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [num_kept]
