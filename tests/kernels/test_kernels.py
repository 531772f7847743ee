"""The compiled passes against the same in torch operators, where there is a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from celora.kernels.c import build as build_module
from celora.kernels.c import dot as dot_module
from celora.kernels.c import library as library_module
from celora.kernels.c import rows as kernels
from celora.machine import cpu as cpu_module
from celora.numerics import reference, select
from patching import patch_all

PYTHON = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}  # where a process of its own finds what is tested
needs_compiler = pytest.mark.skipif(library_module.library() is None, reason="no C compiler")
DTYPES = [torch.float32, torch.bfloat16]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (17, 64), (33, 129)])
def test_row_norms(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    torch.testing.assert_close(kernels.squared_row_norms(x).double(), x.double().square().sum(1), rtol=1e-5, atol=1e-7)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 128])
@pytest.mark.parametrize("subset", [False, True])
def test_quantised_rows(dtype: torch.dtype, offset: int, subset: bool) -> None:
    x = (torch.randn(20, 37) * torch.logspace(-12, 6, 20)[:, None]).to(dtype)
    x[4] = 0
    index = torch.tensor([0, 4, 7, 19]) if subset else None
    q, scale = kernels.quantise_rows(x, index, offset=offset)
    rows = x if index is None else x[index]
    signed = q.int() - 128 if offset else q.view(torch.int8).int()
    expected, scales = reference.quantise(rows.float(), 1)
    torch.testing.assert_close(scale, scales[:, 0])
    assert (signed - expected).abs().max() <= 1  # division and multiplication by the inverse round differently
    assert (signed == expected).float().mean() > 0.99


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(bad: float, dtype: torch.dtype) -> None:
    """A GradScaler must see the overflow: it may not be quantised into something finite."""
    x = torch.randn(3, 8).to(dtype)
    x[1, 5] = bad
    q, scale = kernels.quantise_rows(x, None, offset=128)
    assert torch.isfinite(scale).tolist() == [True, False, True]
    y, out = (q.float() - 128).to(dtype), torch.empty(3, 8, dtype=dtype)
    kernels.scatter_rows(y, None, scale, out, fill=True)
    assert torch.isfinite(out).all(1).tolist() == [True, False, True]


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [True, False])
def test_scattered_rows(dtype: torch.dtype, fill: bool) -> None:
    y, scale, column = torch.randn(3, 10).to(dtype), torch.rand(3), torch.rand(10)
    position = torch.tensor([-1, 0, -1, 1, 2], dtype=torch.int32)
    there = torch.randn(5, 10).to(dtype)
    expected = torch.zeros_like(there) if fill else there.clone()
    expected[[1, 3, 4]] = (y.float() * scale[:, None]).to(dtype)
    out = there.clone()
    kernels.scatter_rows(y, position, scale, out, fill=fill)
    assert out.equal(expected)

    sums = torch.randint(-1000, 1000, (3, 10), dtype=torch.int32)
    expected[[1, 3, 4]] = (sums.float() * (scale[:, None] * column)).to(dtype)
    out = there.clone()
    kernels.scatter_sums(sums, position, scale, column, out, fill=fill)
    assert out.equal(expected)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize("kept", [1, 0.5, 1.0])
def test_the_largest_rows_are_chosen(rows: int, kept: float) -> None:
    squared = torch.rand(rows) * torch.logspace(-30, 30, rows)
    count = max(1, int(kept * rows)) if isinstance(kept, float) else kept
    index, position = kernels.choose_rows(squared, kept=count, share=1.0, step=1)
    assert index.equal(select.top_k(squared, count))
    inverse = torch.full((rows,), -1, dtype=torch.int32)
    inverse[index] = torch.arange(count, dtype=torch.int32)
    assert position.equal(inverse)


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
def test_as_many_rows_are_chosen_as_asked_for_whatever_they_are(bad: float) -> None:
    """A NaN has a sign, too: that of inf - inf is negative on x86."""
    squared = torch.rand(20)
    squared[::2] = bad
    index, position = kernels.choose_rows(squared, kept=7, share=1.0, step=1)
    assert len(index) == 7
    assert set(index.tolist()) <= set(range(0, 20, 2))
    assert position[index].equal(torch.arange(7, dtype=torch.int32))
    assert int((position >= 0).sum()) == 7


@needs_compiler
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.999, 1.0])
def test_the_rows_that_hold_a_share_are_chosen(share: float) -> None:
    squared = torch.rand(300).pow(8)
    squared[torch.randperm(300)[:100]] = 0
    index, _ = kernels.choose_rows(squared, kept=None, share=share, step=1)
    assert index.equal(reference.energy(squared.double(), share))
    rounded, _ = kernels.choose_rows(squared, kept=None, share=share, step=64)
    assert len(rounded) == min(300, -(-len(index) // 64) * 64)
    assert set(index.tolist()) <= set(rounded.tolist())


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_every_row_is_kept_if_one_is_not_finite(bad: float) -> None:
    squared = torch.rand(9)
    squared[3] = bad
    assert len(kernels.choose_rows(squared, kept=None, share=0.5, step=1)[0]) == 9
    assert int(select.energy_count(squared, 0.5)) == 9


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_columns(dtype: torch.dtype) -> None:
    w = torch.randn(19, 30).to(dtype)
    q, scale = reference.quantise(w.float(), 0)
    found = kernels.quantise_columns(w, 1 / scale[0])
    assert (found.float() - q).abs().max() <= 1
    assert (found == q).float().mean() > 0.99


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (7, 2), (19, 33), (40, 200)])
def test_column_maxima(shape: tuple[int, int], dtype: torch.dtype) -> None:
    w = torch.randn(shape).to(dtype)
    assert kernels.column_maxima(w).equal(w.abs().amax(0).float())
    w[0, 0] = float("nan")
    assert kernels.column_maxima(w)[0].isnan()


@pytest.mark.parametrize(
    ("limit", "used"), [(None, True), ("ALL", True), ("avx512_core_amx_fp16", True), ("AVX512_CORE_BF16", False)]
)
def test_matrix_instructions(limit: str | None, used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN may be kept from what the CPU has, and cannot use what it has not."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    for there in (True, False):
        patch_all(monkeypatch, "celora.machine.cpu:features", lambda there=there: {"amx_tile": there})
        assert cpu_module.matrix_instructions.__wrapped__() is (there and used)


@pytest.mark.skipif(not dot_module.panel_columns(), reason="no 8-bit dot products")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (16, 32), (67, 100), (128, 257)])
@pytest.mark.parametrize("kept", [None, 1, 5, 9, 11, 12, 25])
def test_gathered_products(dtype: torch.dtype, shape: tuple[int, int], kept: int | None) -> None:
    """Every number of rows and columns that are left over at the end of a block, and nothing written beside them."""
    x, w = torch.randn(25, shape[0] + 3).to(dtype)[:, : shape[0]], torch.randn(shape).to(dtype)
    index = None if kept is None else torch.randperm(25)[:kept].sort().values
    position = None if index is None else torch.full((25,), -1, dtype=torch.int32)
    if index is not None and position is not None:
        position[index] = torch.arange(len(index), dtype=torch.int32)
    factors = torch.rand(25 if kept is None else kept) + 0.5
    scale = w.float().abs().amax(0).clamp(min=1e-20) / 127
    packed = dot_module.pack_columns(w, 1 / scale)
    rows = x if index is None else x[index]
    expected = factors[:, None] * reference.int8(rows.double(), w.double())
    for fill in (True, False):
        around = torch.full((27, shape[1]), 7.0).to(dtype)
        out = around[1:26]
        dot_module.gathered_product(x, packed, scale, out, index=index, position=position, factors=factors, fill=fill)
        others = torch.ones(25, dtype=torch.bool)
        others[slice(None) if index is None else index] = False
        assert (out[others] == (0 if fill else 7)).all()
        assert (around[[0, 26]] == 7).all()
        assert (out[~others].double() - expected).norm() <= (3e-3 if dtype == torch.float32 else 6e-3) * expected.norm()


@pytest.mark.skipif(not dot_module.multiplies_matrices(), reason="no 8-bit dot products of matrices")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        (1, (1, 1)),
        (70, (64, 32)),
        (200, (700, 33)),
        (300, (1300, 64)),
        (1100, (65, 31)),
        (70, (20000, 32)),
        (40, (40000, 5)),
    ],
)
def test_matrices_multiply_as_vectors_do(
    rows: int, shape: tuple[int, int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, whatever the rows are cut into, by the size of a cache or for the threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, w = torch.randn(rows, shape[0]), torch.randn(shape)
    scale = w.abs().amax(0) / 127
    packed = dot_module.pack_columns(w, 1 / scale)
    loaded = library_module.library()
    assert loaded is not None
    for kept in sorted({0, 1, rows // 2, rows}):
        index = torch.randperm(rows)[:kept].sort().values
        found = torch.full((2, rows, shape[1]), 7.0)
        for out, matrices in zip(found, (True, False), strict=True):
            assert loaded.use_matrices(matrices) == matrices
            dot_module.gathered_product(x, packed, scale, out, index=index, position=None, factors=None, fill=False)
        loaded.use_matrices(True)
        assert found[0].equal(found[1])
        assert (found[0] != 7).any(1).sum() == kept


@pytest.mark.skipif(not dot_module.panel_columns(), reason="no 8-bit dot products")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (67, 100)])
@pytest.mark.parametrize(("kept", "share"), [(1, 1.0), (9, 1.0), (25, 1.0), (None, 0.5), (None, 0.99), (None, 1.0)])
def test_critical_products(dtype: torch.dtype, shape: tuple[int, int], kept: int | None, share: float) -> None:
    """One call is the same as the three that choose and multiply."""
    x = torch.randn(25, shape[0] + 3).to(dtype)[:, : shape[0]] * (torch.rand(25, 1) * 4).exp().to(dtype)
    x[3] = 0
    w = torch.randn(shape).to(dtype)
    scale = w.float().abs().amax(0).clamp(min=1e-20) / 127
    packed = dot_module.pack_columns(w, 1 / scale)
    found = dot_module.critical_product(x, packed, scale, columns=shape[1], kept=kept, share=share)
    index, position = kernels.choose_rows(kernels.squared_row_norms(x), kept=kept, share=share, step=1)
    expected = torch.full((25, shape[1]), 7.0).to(dtype)
    dot_module.gathered_product(x, packed, scale, expected, index=index, position=position, factors=None, fill=True)
    assert found.equal(expected)
    assert (found != 0).any(1).sum() <= len(index) < 26


@needs_compiler
def test_no_columns() -> None:
    assert kernels.column_maxima(torch.ones(3, 0)).shape == (0,)


@needs_compiler
def test_rows_may_be_apart() -> None:
    x = torch.randn(6, 40)[:, 3:17]
    assert kernels.squared_row_norms(x).allclose(x.square().sum(1))
    q, scale = kernels.quantise_rows(x, None, offset=128)
    q2, scale2 = kernels.quantise_rows(x.contiguous(), None, offset=128)
    assert q.equal(q2)
    assert scale.equal(scale2)


def test_only_what_the_kernels_know_is_given_to_them() -> None:
    assert not library_module.supported(torch.ones(2, 2, dtype=torch.float64))
    assert not library_module.supported(torch.ones(2, 2, dtype=torch.float16))
    assert not library_module.supported(torch.ones(2, 3).T)
    assert library_module.supported(torch.ones(2, 2)) == (library_module.library() is not None)


@needs_compiler
@pytest.mark.parametrize("how", ["no home", "not writable"])
def test_without_a_cache_they_are_built_for_the_process(how: str, tmp_path: Path) -> None:
    code = (
        "import pathlib\n"
        "from celora.kernels.c import library\n"
        "def none(): raise RuntimeError('Could not determine home directory.')\n"
        "def denied(*_, **__): raise PermissionError('denied')\n"
        f"pathlib.Path.home, pathlib.Path.mkdir = (none, pathlib.Path.mkdir) if {how == 'no home'} else "
        "(pathlib.Path.home, denied)\n"
        "assert library.library() is not None\n"
        "print(library.library()._name)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TMPDIR": str(tmp_path), **PYTHON},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    built = Path(done.stdout.strip())
    assert built.parent.parent == tmp_path
    assert not built.exists()  # taken away with the process


def load_in(cache: Path, *, path: str | None = None, home: Path | None = None) -> tuple[Path, str]:
    """The file that another process loads, from `cache` or from wherever else, and why it loads none, or keeps none."""
    code = (
        "from celora.kernels.c import build, library; loaded = library.library()\n"
        "print(loaded and loaded._name, build.why_not() or build.why_not_kept())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": path or os.environ["PATH"], "HOME": str(home or cache), "XDG_CACHE_HOME": str(cache), **PYTHON},
        capture_output=True,
        text=True,
        check=True,
    )
    name, _, reason = done.stdout.strip().partition(" ")
    return Path(name), reason


@needs_compiler
def test_a_damaged_library_is_made_anew(tmp_path: Path) -> None:
    made, _ = load_in(tmp_path)
    assert made.parent == tmp_path / "celora" / "kernels"
    whole = made.stat().st_size
    made.write_bytes(bytes(1000))
    assert load_in(tmp_path) == (made, "")
    assert made.stat().st_size == whole


@needs_compiler
def test_a_library_that_others_could_have_written_is_not_loaded(tmp_path: Path) -> None:
    made, _ = load_in(tmp_path)
    before = made.stat()
    made.chmod(0o777)
    assert load_in(tmp_path) == (made, "")
    assert made.stat().st_ino != before.st_ino  # made anew
    assert made.stat().st_mode & 0o022 == 0


@needs_compiler
def test_a_folder_that_others_could_write_to_is_closed(tmp_path: Path) -> None:
    made, _ = load_in(tmp_path)
    made.parent.chmod(0o777)
    assert load_in(tmp_path) == (made, "")
    assert made.parent.stat().st_mode & 0o022 == 0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a user whose cache is `home/.cache`, in a folder that the tests may open to others."""
    if not hasattr(os, "getuid"):
        pytest.skip("nothing is compiled on Windows")
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return home


def test_every_folder_of_the_cache_is_made_for_the_user_alone(home: Path) -> None:
    """Whatever the umask: who may write to a parent may put another folder in the place of the one looked at."""
    before = os.umask(0o002)
    try:
        made = build_module._cache()
    finally:
        os.umask(before)
    assert made == home / ".cache" / "celora" / "kernels"
    for folder in (made, *made.parents[:2]):
        assert folder.stat().st_mode & 0o777 == 0o700, folder


@pytest.mark.fault(
    "security",
    "a folder above the cache of compiled kernels that others can write to",
    sees="`celora doctor` names the folder",
    kept="nothing is loaded from there; each process compiles its own",
)
@pytest.mark.parametrize("where", ["cache", "cache/deep", "link", "."])
def test_no_folder_above_the_cache_may_be_open_to_others(
    where: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache" / "deep"
    cache.mkdir(parents=True, mode=0o700)
    (tmp_path / "link").symlink_to(cache)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "link" if where == "link" else cache))
    assert build_module._cache() == cache / "celora" / "kernels"
    opened = cache if where == "link" else (tmp_path / where).resolve()
    opened.chmod(0o775)
    with pytest.raises(PermissionError, match=f"^{opened} could be written to by others"):
        build_module._cache()
    if opened != cache:
        opened.chmod(0o1777)  # as /tmp is: nobody can replace what is another's
        assert build_module._cache() == cache / "celora" / "kernels"


def test_folders_of_celora_that_were_made_open_are_closed(home: Path) -> None:
    made = build_module._cache()
    for folder in (made.parent, made):
        folder.chmod(0o775)
    assert build_module._cache() == made
    assert made.stat().st_mode & 0o777 == made.parent.stat().st_mode & 0o777 == 0o700


def test_what_is_above_the_users_home_is_not_looked_at(home: Path) -> None:
    """What can replace a home has the user's own programs, too."""
    home.parent.chmod(0o777)
    assert build_module._cache().is_relative_to(home)
    home.chmod(0o777)
    with pytest.raises(PermissionError, match=f"^{home} could be written to by others"):
        build_module._cache()


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("what", [".cache", ".cache/celora"])
def test_a_folder_of_somebody_else_above_the_cache_is_not_trusted(what: str, home: Path) -> None:
    build_module._cache()
    os.chown(home / what, 12345, -1)
    with pytest.raises(PermissionError, match=f"^{home / what} could be written to by others"):
        build_module._cache()


@needs_compiler
def test_kernels_that_cannot_be_kept_are_compiled_anyway(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.chmod(0o777)
    loaded = object()
    patch_all(monkeypatch, "celora.kernels.c.build:_built", lambda compiler, folder: loaded)
    patch_all(monkeypatch, "celora.kernels.c.build:_private", lambda: tmp_path)
    found, reason = build_module.build_and_load.__wrapped__()
    assert found is loaded
    assert reason == f"they could not be kept or loaded: {home} could be written to by others"


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    made, _ = load_in(tmp_path)
    os.chown(made.parent, 12345, -1)
    assert load_in(tmp_path)[0].parent != made.parent


@needs_compiler
def test_each_compiler_is_tried(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    works = next(filter(None, map(shutil.which, build_module._COMPILERS)))
    for name, does in (("cc", "exit 1"), ("gcc", f'exec "{works}" "$@"')):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    assert load_in(tmp_path, path=path)[0].parent == tmp_path / "celora" / "kernels"


@pytest.mark.skipif(sys.platform == "win32", reason="never built there")
def test_why_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, false = build_module.build_and_load.__wrapped__, shutil.which("false")
    monkeypatch.setenv("CELORA_KERNELS", "0")
    assert load() == (None, "CELORA_KERNELS=0 turns them off")
    monkeypatch.delenv("CELORA_KERNELS")
    monkeypatch.setattr(build_module.shutil, "which", lambda name: None)
    assert load() == (None, "no C compiler (cc, gcc, clang) is installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build_module.shutil, "which", lambda name: false)
    assert load() == (None, f"{false} could not build them")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    patch_all(monkeypatch, "celora.kernels.c.build:_built", full)
    assert load() == (None, "they could not be kept or loaded: [Errno 28] No space left on device")


@pytest.mark.parametrize(
    "environment", [{"CELORA_KERNELS": "0"}, {"PATH": ""}, {"PATH": "{folder}"}], ids=["off", "none", "broken"]
)
def test_without_a_working_compiler_everything_works_through_torch(environment: dict[str, str], tmp_path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    environment = {key: value.format(folder=tmp_path) for key, value in environment.items()}
    code = (
        "import torch; from celora.kernels.c import library; from celora.numerics.estimators import Tokens\n"
        "assert library.library() is None\n"
        "G, W = torch.randn(40, 32), torch.randn(32, 48)\n"
        "for selection in ('topk', 'energy'):\n"
        "    e = Tokens(32, 48, keep_ratio=0.9, selection=selection, precision='int8').estimate(G, W)\n"
        "    assert (e - G @ W).norm() < 0.5 * (G @ W).norm()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path), **PYTHON, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
