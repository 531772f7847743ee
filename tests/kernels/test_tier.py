"""Which tier of the kernels is used, what celora says about a tier that is missing, and whose threads they run on."""

from __future__ import annotations

import os
import subprocess
import sys
from ctypes.util import find_library

import pytest
import torch

from celora.kernels.c import rows
from celora.kernels.c.build import build_and_load
from celora.kernels.c.tier import Kernels, load, offered, why_this
from patching import patch_all
from tiers import TIERS, each_tier

fresh = load.__wrapped__
needs_kernels = pytest.mark.skipif(not TIERS, reason="no compiled kernels")


@pytest.mark.parametrize("asked", [None, "", "1", *TIERS])
@needs_kernels
def test_the_newest_tier_is_used_unless_another_is_asked_for(
    asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CELORA_KERNELS", raising=False)
    if asked is not None:
        monkeypatch.setenv("CELORA_KERNELS", asked)
    kernels, _ = fresh()
    assert kernels is not None
    assert kernels.tier == (asked if asked in TIERS else TIERS[-1])
    patch_all(monkeypatch, "celora.kernels.c.tier:load", lambda: (kernels, ""))
    why = f"CELORA_KERNELS={asked}" if asked in TIERS else f"the newest of {', '.join(TIERS)}"
    assert why_this() == f"{kernels.tier} ({why})"


@needs_kernels
@pytest.mark.parametrize("asked", ["avx1024", "on", "neon" if TIERS[:1] == ["baseline"] else "amx"])
def test_a_tier_that_is_not_there_is_said_in_one_line(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELORA_KERNELS", asked)
    with pytest.warns(UserWarning, match=f"^celora: CELORA_KERNELS={asked} .*{TIERS[-1]}.*torch's operators") as said:
        kernels, reason = fresh()
    assert kernels is None
    assert reason in str(said[0].message)
    assert "\n" not in reason


@needs_kernels
def test_matrices_are_left_alone_where_onednn_has_to(monkeypatch: pytest.MonkeyPatch) -> None:
    library, _ = build_and_load()
    assert library is not None
    patch_all(monkeypatch, "celora.machine.cpu:matrix_instructions", lambda: False)
    assert "amx" not in offered(library)
    assert offered(library)[0] in ("baseline", "neon")


@needs_kernels
@pytest.mark.parametrize("preloaded", [False, True])
def test_there_is_one_openmp_runtime_and_it_is_torchs(preloaded: bool) -> None:
    """Also where another one was preloaded, as Intel advises: torch uses that one, and loads its own in vain."""
    code = (
        "import os, re; from pathlib import Path; import torch\n"
        "def loaded():\n"
        "    maps = Path('/proc/self/maps').read_text().split()\n"
        "    return {name for name in maps if re.search(r'/lib(gomp|omp|iomp5)[-.]', name)}\n"
        "torch.set_num_threads(2); torch.ones(1 << 20).exp()\n"  # its second thread has started
        "before, threads = loaded(), len(os.listdir('/proc/self/task'))\n"
        "from celora.kernels.c.tier import load; from celora.kernels.c import rows\n"
        "kernels, _ = load(); rows.squared_row_norms(torch.ones(8, 8))\n"
        "print(kernels.threaded, len(before), loaded() == before, len(os.listdir('/proc/self/task')) == threads)\n"
    )
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("only Linux lists what a process has loaded")
    other = (find_library("iomp5") or find_library("omp")) if preloaded else ""
    if other is None:
        pytest.skip("no other runtime is installed")
    environment = os.environ | {"LD_PRELOAD": other}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "2" if preloaded else "1", "True", "True"], done.stderr


@needs_kernels
def test_they_run_in_a_python_that_leaves_out_assertions() -> None:
    code = "import torch; from celora.kernels.c import rows; print(rows.squared_row_norms(torch.ones(2, 8)).tolist())"
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["[8.0,", "8.0]"], done.stderr


@each_tier
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_row_is_some_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for count in (0, 1, 4, 5, 6, 17):
        x = torch.arange(1.0, count + 1)[:, None]
        assert rows.squared_row_norms(x).equal(x[:, 0] ** 2)


@needs_kernels
def test_without_a_runtime_to_share_they_run_on_threads_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    library, _ = build_and_load()
    assert library is not None
    used, _ = load()
    assert used is not None
    x = torch.randn(9, 5)
    expected = rows.squared_row_norms(x)
    with monkeypatch.context() as patch:
        patch.setattr("celora.kernels.c.tier._RUNTIMES", ())
        alone = Kernels(library, used.tier)
        assert not alone.threaded
        patch_all(patch, "celora.kernels.c.library:library", lambda: alone)
        patch_all(patch, "celora.kernels.c.tier:load", lambda: (alone, ""))
        assert why_this().endswith(", on Python's threads: torch has no OpenMP to share")
        patch.setattr(torch, "get_num_threads", lambda: 3)
        assert rows.squared_row_norms(x).equal(expected)
    assert Kernels(library, TIERS[-1]).threaded  # from here on, everything is as before
