"""Passes that torch has no fast operator for, in C, built where there is a compiler.

At these sizes the passes decide: scaling, rounding and scattering with torch's operators costs more than the product,
and a softmax over a vocabulary more than the projection onto it.
`rows.c` and what it includes are compiled once (a second or two) for the machine's own instruction set and kept in the
user's cache folder, or, where there is none that only the user can write to, once a process.
Without a compiler, `library()` is None and everything works through torch's operators, slower; the planner measures
what it gets, so it assumes nothing.

`CELORA_KERNELS=0` turns them off.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from celora.cpu import features, instruction_set
from celora.files import sync

_SOURCE = Path(__file__).with_name("rows.c")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_COMPILERS = ("cc", "gcc", "clang")
_WIDE = "-mprefer-vector-width=512"
_P, _N, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "choose_rows": [_P, _N, _N, ctypes.c_double, _N, _P, _P],
    "squared_row_norms": [_P, _N, _N, _N, _P, _I],
    "quantise_rows": [_P, _P, _N, _N, _N, ctypes.c_float, _P, _P, _I],
    "scatter_rows": [_P, _P, _N, _N, _P, _P, _I, _I],
    "scatter_sums": [_P, _P, _N, _N, _P, _P, _P, _I, _I],
    "softmax_rows": [_P, _N, _N, _P, ctypes.c_float, ctypes.c_float, _P, _P, _P, _I, _I],
    "column_maxima": [_P, _N, _N, _N, _P, _I],
    "quantise_columns": [_P, _N, _N, _N, _P, _P, _I],
    "rms_norm": [_P, _N, _N, _P, ctypes.c_float, ctypes.c_float, _I, _P, _P, _I],
    "rms_norm_backward": [_P, _P, _N, _N, _P, ctypes.c_float, _P, _P, _I],
    "gated": [_P, _P, _N, _N, _P, _I],
    "gated_backward": [_P, _P, _P, _N, _N, _P, _P, _I],
    "rotate": [_P, _N, _N, _N, _P, _P, _N, _I, _P, _I],
}
_DOT_SIGNATURES = {  # dot.c; only where the machine has the instructions
    "pack_columns": [_P, _N, _N, _N, _P, _P, _I],
    "gathered_product": [_P, _N, _N, _N, _P, _P, _N, _P, _P, _P, _N, _P, _P, _P, _P, _I, _I],
    "critical_product": [_P, _N, _N, _N, _N, ctypes.c_double, _P, _P, _N, _P, _P, _I],
}
_ATTENTION_SIGNATURES = {  # attention.c; only where the machine has matrix instructions
    "attention": [_P, _P, _P, _P, _P, _N, _N, _N, _N, _N, ctypes.c_float, _P, _N, _P, _P, _I],
    "attention_backward": [_P, _P, _P, _P, _P, _P, _N, _N, _N, _N, _N, ctypes.c_float, _P, _N, _P, _P, _P, _P, _P, _I],
}
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


def supported(tensor: Tensor) -> bool:
    """Whether the kernels can work on this tensor: on CPU, of a dtype they know, rows contiguous, not being traced."""
    if torch.compiler.is_compiling() or tensor.device.type != "cpu" or tensor.dtype not in _NAMES:
        return False
    return tensor.stride(-1) == 1 and library() is not None


def squared_row_norms(x: Tensor) -> Tensor:
    """`sum_i x[t, i]^2` of `x: (T, n)`: (T,) float32."""
    rows, columns = x.shape
    squared = torch.empty(rows, dtype=torch.float32, device="cpu")
    _call("squared_row_norms", x, x.data_ptr(), rows, columns, x.stride(0), squared.data_ptr())
    return squared


def choose_rows(squared: Tensor, *, kept: int | None, share: float, step: int) -> tuple[Tensor, Tensor]:
    """The `kept` rows with the largest `squared`: (T,) float32, ascending: (K,) int64; and the inverse: (T,) int32.

    With `kept=None`, as many as hold `share` of the sum, rounded up to a multiple of `step`: `select.energy_count`.
    """
    rows = squared.shape[0]
    index = torch.empty(rows, dtype=torch.int64, device="cpu")
    position = torch.empty(rows, dtype=torch.int32, device="cpu")
    chosen = _loaded().choose_rows(
        squared.data_ptr(), rows, -1 if kept is None else kept, share, step,
        index.data_ptr(), position.data_ptr(),
    )  # fmt: skip
    return index[:chosen], position


def quantise_rows(x: Tensor, index: Tensor | None, *, offset: int) -> tuple[Tensor, Tensor]:
    """Rows `index` (all of them if None) of `x: (T, n)` as `offset + round(x / scale)`, `scale = max |row| / 127`,
    or the smallest normal number.

    Returns the bytes, uint8 (K, n), to be read as int8 with `offset=0`, and the scales, float32 (K,).
    """
    rows, columns = x.shape
    rows = rows if index is None else index.shape[0]
    q = torch.empty(rows, columns, dtype=torch.uint8, device="cpu")
    scale = torch.empty(rows, dtype=torch.float32, device="cpu")
    _call("quantise_rows", x, x.data_ptr(), _pointer(index), rows, columns, x.stride(0), offset, q.data_ptr(),
          scale.data_ptr())  # fmt: skip
    return q, scale


def scatter_rows(y: Tensor, position: Tensor | None, row_scale: Tensor, out: Tensor, *, fill: bool) -> None:
    """`out[t] = row_scale[k] y[k]` with `k = position[t]`, int32, or t itself; rows with k < 0 become 0 if `fill`."""
    rows, columns = out.shape
    _call(
        "scatter_rows", y, y.data_ptr(), _pointer(position), rows, columns, row_scale.data_ptr(), out.data_ptr(), fill
    )


def scatter_sums(
    y: Tensor, position: Tensor | None, row_scale: Tensor, column_scale: Tensor, out: Tensor, *, fill: bool
) -> None:
    """The same for sums of 8-bit products, int32: `out[t, j] = row_scale[k] column_scale[j] y[k, j]`."""
    rows, columns = out.shape
    _call("scatter_sums", out, y.data_ptr(), _pointer(position), rows, columns, row_scale.data_ptr(),
          column_scale.data_ptr(), out.data_ptr(), fill)  # fmt: skip


def softmax_rows(
    z: Tensor,
    targets: Tensor,
    *,
    scale: float,
    smoothing: float,
    log_probs: Tensor,
    entropy: Tensor | None,
    top1: Tensor | None,
    write: bool,
) -> None:
    """Of `y = scale z`, z: (N, V): the log-probability of each target, (N,), and entropy and top1 where asked for.

    With `write`, z becomes the gradient of `log_probs`, which smoothing s makes `(1 - s) log p_target + s mean log p`.
    """
    rows, columns = z.shape
    _call("softmax_rows", z, z.data_ptr(), rows, columns, targets.data_ptr(), scale, smoothing, log_probs.data_ptr(),
          _pointer(entropy), _pointer(top1), write)  # fmt: skip


def column_maxima(w: Tensor) -> Tensor:
    """`max_i |w[i, j]|` of `w: (out, in)`: (in,) float32."""
    rows, columns = w.shape
    largest = torch.empty(columns, dtype=torch.float32, device="cpu")
    _call("column_maxima", w, w.data_ptr(), rows, columns, w.stride(0), largest.data_ptr())
    return largest


def quantise_columns(w: Tensor, inverse_scale: Tensor) -> Tensor:
    """`round(w[i, j] inverse_scale[j])` of `w: (out, in)`: int8 (out, in)."""
    rows, columns = w.shape
    q = torch.empty(rows, columns, dtype=torch.int8, device="cpu")
    _call("quantise_columns", w, w.data_ptr(), rows, columns, w.stride(0), inverse_scale.data_ptr(), q.data_ptr())
    return q


def rms_norm(x: Tensor, weight: Tensor, *, offset: float, eps: float, rounds: bool) -> tuple[Tensor, Tensor]:
    """`(offset + weight) x r` of `x: (..., n)` with `r = 1 / sqrt(mean x^2 + eps)`, and r: float32; contiguous.

    `x r` is rounded to x's dtype before it is multiplied, if `rounds`.
    """
    y, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    _call("rms_norm", x, x.data_ptr(), *_rows(x), weight.data_ptr(), offset, eps, rounds, y.data_ptr(),
          inverse.data_ptr())  # fmt: skip
    return y, inverse


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, *, offset: float) -> Tensor:
    """The gradient of x from that of `rms_norm`, whose r is `inverse`; all contiguous."""
    out = torch.empty_like(x)
    _call("rms_norm_backward", x, grad.data_ptr(), x.data_ptr(), *_rows(x), weight.data_ptr(), offset,
          inverse.data_ptr(), out.data_ptr())  # fmt: skip
    return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) up`, of contiguous tensors; `silu(gate)` is rounded to their dtype before it is multiplied."""
    out = torch.empty_like(gate)
    _call("gated", gate, gate.data_ptr(), up.data_ptr(), *_rows(gate), out.data_ptr())
    return out


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up from that of `gated`; all contiguous."""
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    _call("gated_backward", gate, grad.data_ptr(), gate.data_ptr(), up.data_ptr(), *_rows(gate), of_gate.data_ptr(),
          of_up.data_ptr())  # fmt: skip
    return of_gate, of_up


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, *, transposed: bool) -> Tensor:
    """Rotary embedding of `x: (B, T, heads, d)`: `(x1 c1 - x2 s1, x2 c2 + x1 s2)`; all contiguous.

    `cosine`, `sine`: (B or 1, T, d), whose halves are c1 and c2, s1 and s2. With `transposed` the gradient
    of x from that of the result: `(x1 c1 + x2 s2, x2 c2 - x1 s1)`.
    """
    batch, tokens, heads, columns = x.shape
    out = torch.empty_like(x)
    _call("rotate", x, x.data_ptr(), batch * tokens, heads, columns, cosine.data_ptr(), sine.data_ptr(),
          cosine.numel() // columns, transposed, out.data_ptr())  # fmt: skip
    return out


@functools.cache  # oneDNN looks once, too
def matrix_instructions() -> bool:
    """Whether oneDNN multiplies with AMX: this CPU has it, and `ONEDNN_MAX_CPU_ISA` does not keep oneDNN from it."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return features()["amx_tile"] and (limit in ("", "ALL", "DEFAULT") or "AMX" in limit)


def panel_columns() -> int:
    """How many columns of a packed weight lie together; 0 where there is no `gathered_product`."""
    loaded = library()
    return 0 if loaded is None else int(loaded.panel_columns())


@functools.cache
def multiplies_matrices() -> bool:
    """Whether `gathered_product` uses `matrix_instructions`, which it does from then on.

    False too where the compiler did not know them or the system refuses them.
    """
    loaded = library()
    return loaded is not None and panel_columns() > 0 and bool(loaded.use_matrices(matrix_instructions()))


def attends() -> bool:
    """Whether there is `attention`."""
    return multiplies_matrices() and hasattr(library(), "attention_work")


def pack_columns(w: Tensor, inverse_scale: Tensor) -> Tensor:
    """`round(w[i, j] inverse_scale[j])` of `w: (out, in)`, laid out for `gathered_product`: uint8."""
    rows, columns = w.shape
    panel, step = panel_columns(), int(_loaded().depth_step())
    packed = torch.empty(-(-columns // panel), -(-rows // step) * step // 4, panel, 4, dtype=torch.uint8, device="cpu")
    _call("pack_columns", w, w.data_ptr(), rows, columns, w.stride(0), inverse_scale.data_ptr(), packed.data_ptr())
    return packed


def gathered_product(
    x: Tensor,
    packed: Tensor,
    column_scale: Tensor,
    out: Tensor,
    *,
    index: Tensor | None,
    position: Tensor | None,
    factors: Tensor | None,
    fill: bool,
) -> None:
    """`out[t] = factors[k] x[t] W` in 8 bits at each row t = index[k] of `x: (T, out)`; 0 at the others if `fill`.

    All rows if `index` is None. `position` is the inverse of `index`; `factors`, float32 (K,), may be None for 1.
    """
    rows, depth = x.shape
    kept = rows if index is None else index.shape[0]
    scratch = torch.empty(_scratch_bytes(kept, depth), dtype=torch.uint8, device="cpu")
    scales = torch.empty(kept, dtype=torch.float32, device="cpu")
    starts = torch.empty(kept, dtype=torch.int32, device="cpu")
    _call("gathered_product", x, x.data_ptr(), rows, depth, x.stride(0), _pointer(index), _pointer(position), kept,
          _pointer(factors), packed.data_ptr(), column_scale.data_ptr(), out.shape[1], scratch.data_ptr(),
          scales.data_ptr(), starts.data_ptr(), out.data_ptr(), fill)  # fmt: skip


def critical_product(
    x: Tensor, packed: Tensor, column_scale: Tensor, *, columns: int, kept: int | None, share: float
) -> Tensor:
    """`gathered_product` of the rows that `choose_rows` chooses by their norms, in one call: (T, columns)."""
    rows, depth = x.shape
    out = x.new_empty(rows, columns)
    work = torch.empty(rows * (8 + 4 * 4) + _scratch_bytes(rows, depth), dtype=torch.uint8, device="cpu")
    _call("critical_product", x, x.data_ptr(), rows, depth, x.stride(0), -1 if kept is None else kept, share,
          packed.data_ptr(), column_scale.data_ptr(), columns, work.data_ptr(), out.data_ptr())  # fmt: skip
    return out


def attention(query: Tensor, key: Tensor, value: Tensor, sequences: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of each of `sequences`, (batch, first token, length): (S, 3) int64, which hold every token.

    `query: (B, H, T, d)`, `key`, `value`: (B, H or fewer, T, d), bfloat16, d a multiple of 32. Returns (B, T, H, d) and
    the logarithms of the sums of the softmax, float32 (B, H, T). Where it `attends`.
    """
    batch, heads, tokens, size = query.shape
    out = query.new_empty(batch, tokens, heads, size)
    logs = query.new_empty(batch, heads, tokens, dtype=torch.float32)
    strides, work = _strides(query, key, value), _attention_work(sequences, size, backward=False)
    _call("attention", query, query.data_ptr(), key.data_ptr(), value.data_ptr(), strides.data_ptr(),
          sequences.data_ptr(), len(sequences), tokens, heads, heads // key.shape[1], size, scale, work.data_ptr(),
          work.shape[1], out.data_ptr(), logs.data_ptr())  # fmt: skip
    return out, logs


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logs: Tensor,
    sequences: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, as they are shaped, from that of `attention`'s `out`: (B, T, H, d)."""
    batch, heads, tokens, size = query.shape
    found = tuple(t.new_empty(batch, tokens, t.shape[1], size) for t in (query, key, value))
    strides, work = _strides(query, key, value, grad.transpose(1, 2)), _attention_work(sequences, size, backward=True)
    _call("attention_backward", query, query.data_ptr(), key.data_ptr(), value.data_ptr(), grad.data_ptr(),
          strides.data_ptr(), sequences.data_ptr(), len(sequences), tokens, heads, heads // key.shape[1], size, scale,
          work.data_ptr(), work.shape[1], out.data_ptr(), logs.data_ptr(), *(t.data_ptr() for t in found))  # fmt: skip
    of_query, of_key, of_value = (t.transpose(1, 2) for t in found)
    return of_query, of_key, of_value


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None if they are turned off or cannot be built here: see `why_not`."""
    loaded, _ = _load()
    if loaded is None:
        return None
    loaded.choose_rows.restype = _N
    if loaded.panel_columns():
        loaded.scratch_bytes.argtypes, loaded.scratch_bytes.restype = [_N, _N], _N
    for name, types in (_SIGNATURES | (_DOT_SIGNATURES if loaded.panel_columns() else {})).items():
        for function in [name] if name == "choose_rows" else [f"{name}_{of}" for of in _NAMES.values()]:
            getattr(loaded, function).argtypes = types
    if hasattr(loaded, "attention_work"):
        loaded.attention_work.argtypes, loaded.attention_work.restype = [_N, _N, _I], _N
        for name, types in _ATTENTION_SIGNATURES.items():
            getattr(loaded, f"{name}_bf16").argtypes = types
    return loaded


def why_not() -> str:
    """Why `library` is None, or ''."""
    loaded, reason = _load()
    return "" if loaded is not None else reason


def why_not_kept() -> str:
    """Why each process compiles them anew, where it does, or ''."""
    loaded, reason = _load()
    return "" if loaded is None else reason


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, and why there is none or why it is not kept."""
    if os.environ.get("CELORA_KERNELS") == "0":
        return None, "CELORA_KERNELS=0 turns them off"
    if sys.platform == "win32":
        return None, "they are not built on Windows"
    reason = f"no C compiler ({', '.join(_COMPILERS)}) is installed"
    for compiler in filter(None, map(shutil.which, _COMPILERS)):
        for folder in (_cache, _private):
            try:
                return _built(compiler, folder()), "" if folder is _cache else reason
            except subprocess.SubprocessError:
                reason = f"{compiler} could not build them"
                break  # nor could it elsewhere
            except (OSError, RuntimeError) as error:  # no home folder, one that cannot be used, or a full disk
                reason = f"they could not be kept or loaded: {' '.join(str(error).split())}"
    return None, reason


def _cache() -> Path:
    """The user's folder for what is compiled; OSError where others could put a library there."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home).absolute() / "celora" / "kernels"
    for parent in reversed((folder, *folder.parents)):
        if not parent.exists():
            parent.mkdir(mode=0o700, exist_ok=True)  # `parents=True` would make those above as the umask says
    for own in (folder.parent, folder):
        if own.stat().st_uid == os.getuid() and not _trusted(own):
            own.chmod(0o700)  # an earlier version made it as the umask said; what others have put there is not loaded
    folder = folder.resolve()  # what a link leads to is checked, and used from then on
    if (unsafe := _open_to_others(folder)) is not None:
        raise PermissionError(f"{unsafe} could be written to by others")
    return folder


def _open_to_others(folder: Path) -> Path | None:
    """The first of `folder` and the folders above it in which others could replace what leads to it.

    Looks up to the user's home, or up to the root where `folder` lies elsewhere. In a sticky folder, as /tmp is one,
    nobody can replace what is another's.
    """
    way = [folder, *folder.parents]
    with contextlib.suppress(RuntimeError):  # no home
        home = Path.home().resolve()
        if folder.is_relative_to(home):
            way = [parent for parent in way if parent.is_relative_to(home)]
    return next((parent for parent in way if not _trusted(parent, sticky=parent != folder)), None)


@functools.cache
def _private() -> Path:
    """A folder for this process alone."""
    folder = Path(tempfile.mkdtemp(prefix="celora-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _trusted(path: Path, *, sticky: bool = False) -> bool:
    """Whether nobody but this user and root can write to it or, with `sticky`, replace what these two have in it."""
    found = path.stat()
    closed = not found.st_mode & 0o022 or (sticky and found.st_mode & stat.S_ISVTX)
    return found.st_uid in (os.getuid(), 0) and bool(closed)


def _built(compiler: str, folder: Path) -> ctypes.CDLL:
    """Load what `folder` has, or compile into it, under a name that says what it was made of and for."""
    made_of = [
        *(file.read_text(encoding="utf-8") for file in sorted(_SOURCE.parent.glob("*.c"))),
        compiler,
        platform.machine(),
        instruction_set(),  # what -march=native would see: a home folder may be shared by machines that differ
        *_FLAGS,
    ]
    made = folder / f"rows-{hashlib.sha256('|'.join(made_of).encode()).hexdigest()[:16]}.so"
    if made.is_file() and _trusted(made):
        with contextlib.suppress(OSError):  # damaged: it is made anew
            return ctypes.CDLL(str(made))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / made.name
        # Not every compiler knows the wide registers' option, or has an assembler that knows tiles.
        for flags in ((*_FLAGS, _WIDE), _FLAGS, (*_FLAGS, "-DNO_TILES")):
            done = subprocess.run(
                [compiler, *flags, "-o", str(built), str(_SOURCE)], capture_output=True, timeout=120, check=False
            )
            if done.returncode == 0:
                break
        done.check_returncode()
        built.chmod(0o755)
        sync(built)  # half a library ends the process that calls it
        built.replace(made)
    return ctypes.CDLL(str(made))


def _loaded() -> ctypes.CDLL:
    loaded = library()
    assert loaded is not None
    return loaded


def _call(name: str, typed: Tensor, *arguments: float | None) -> None:
    getattr(_loaded(), f"{name}_{_NAMES[typed.dtype]}")(*arguments, torch.get_num_threads())


def _scratch_bytes(rows: int, depth: int) -> int:
    """Bytes that the products of `dot.c` need for so many quantised rows."""
    return int(_loaded().scratch_bytes(rows, depth))


def _rows(tensor: Tensor) -> tuple[int, int]:
    """How many rows a contiguous tensor has, and of how many numbers."""
    columns = tensor.shape[-1]
    return tensor.numel() // columns, columns


def _strides(*tensors: Tensor) -> Tensor:
    """How far batches, heads and tokens are apart in each of `tensors: (B, H, T, d)`: (n, 3)."""
    return torch.tensor([t.stride()[:3] for t in tensors], device="cpu")


def _attention_work(sequences: Tensor, size: int, *, backward: bool) -> Tensor:
    """Memory for each thread to work in: (threads, bytes)."""
    each = _loaded().attention_work(int(sequences[:, 2].max()), size, backward)
    return torch.empty(torch.get_num_threads(), each, dtype=torch.uint8, device="cpu")


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
