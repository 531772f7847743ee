"""Compile the Triton kernels for GPUs that are not here: `python -m benchmarks.kernels.offline [--check] [--quick]`.

Every launch of `celora.kernels.triton` is compiled for each compute capability and assembled by the `ptxas` that Triton
carries. A row has registers, shared memory and spilled bytes. `--check` compares with the committed rows of the same
version of Triton or, where there are none, of the newest. It ends with status 1 where a kernel spills, takes more than
a tenth more of something, or does not multiply in 8 bits. Nothing is run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from packaging.version import Version
from torch import Tensor

from benchmarks import rows
from celora.kernels import floats
from celora.kernels.triton import launches, product

ROWS = Path(__file__).with_name("offline.jsonl")
CAPABILITIES = (80, 86, 89, 90, 100)
# Most shared memory of a program, in bytes, by compute capability (CUDA C++ Programming Guide).
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
_UNEVEN = 4104  # a depth that is no multiple of 16
MOST = 1.1  # times as much as in the committed row
_MULTIPLIES = r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*"
_8_BITS = r"s8|e4m3|i8|f8f6f4"


class Elsewhere:
    """What Triton asks of the driver, answered as on a machine with a GPU of this compute capability."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return int(self.target.arch)

    def get_current_stream(self, device: object = None) -> int:
        return 0


def compiled(capability: int, launch: Callable[[], object]) -> Any:
    """The last kernel that `launch` would start on such a GPU. Its tensors are on the device `meta`."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run, found = JITFunction.run, []

    def only_compile(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        found.append(run(self, *arguments, grid=grid, warmup=True, **named))

    driver.set_active(Elsewhere(capability))  # for good: this process runs nothing
    with mock.patch.object(JITFunction, "run", only_compile):
        launch()
    return found[-1]


def assembled(kernel: Any, capability: int) -> dict[str, int]:
    """Registers of a thread and bytes that it spills, as `ptxas` says."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={sm_arch_from_capability(capability)}", file.name]
        said = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True, check=True).stderr
    spilled = sum(int(found) for found in re.findall(r"(\d+) bytes spill", said))
    return {"registers": int(re.findall(r"Used (\d+) registers", said)[0]), "spilled_bytes": spilled}


def _like(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launched(capability: int, *, quick: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every launch by its name, with sizes of a Llama; for `quick`, of the products only the tiles taken untimed."""
    x, index = _like(4096, 4096), _like(2048, dtype=torch.int64)
    multiplies_floats = capability >= 10 * floats.LEAST[0] + floats.LEAST[1]
    formats = (torch.int8, torch.float8_e4m3fn) if multiplies_floats else (torch.int8,)
    fold = _like(4096, dtype=torch.float32)
    for dtype in formats:
        name = str(dtype).removeprefix("torch.").removesuffix("fn")
        yield f"quantise_rows, {name}", lambda dtype=dtype: launches.quantise_rows(x, index, fold=fold, dtype=dtype)
    yield "squared_row_norms", lambda: launches.squared_row_norms(x)
    yield "squared_column_norms", lambda: launches.squared_column_norms(x)
    yield "column_maxima", lambda: launches.column_maxima(x)
    for name, cap in (("softmax_rows", None), ("softmax_rows, capped", 30.0)):
        yield name, lambda cap=cap: _softmax(cap)
    for dtype in formats:
        for number, tiles in enumerate(product.TILES):
            if quick and number not in (0, product.UNTIMED):
                continue
            for order in ("depth", "columns"):
                name = f"product, {str(dtype).removeprefix('torch.').removesuffix('fn')}, {order} first, "
                name += f"{tiles.rows} x {tiles.columns} x {tiles.depth}"
                yield name, lambda dtype=dtype, tiles=tiles, order=order: _product(dtype, tiles, order)
    for dtype in formats:
        name = f"product, {str(dtype).removeprefix('torch.').removesuffix('fn')}, depth of {_UNEVEN:,}"
        yield name, lambda dtype=dtype: _uneven(dtype)


def _softmax(cap: float | None) -> None:
    numbers = [_like(512, dtype=torch.float32) for _ in range(2)]
    launches.softmax_rows(
        _like(512, 128_256), _like(512, dtype=torch.int64), scale=1.0, cap=cap, smoothing=0.1, log_probs=numbers[0],
        entropy=numbers[1], top1=_like(512, dtype=torch.bool), write=True,
    )  # fmt: skip


def _product(dtype: torch.dtype, tiles: product.Tiles, order: str) -> None:
    b, scale = _like(4096, 4096, dtype=dtype), _like(4096, dtype=torch.float32)
    product.scaled_product(
        _like(2048, 4096, dtype=dtype), b if order == "columns" else b.t(), scale[:2048], scale, _like(4096, 4096),
        bias=_like(4096), index=_like(2048, dtype=torch.int64), tiles=tiles,
    )  # fmt: skip


def _uneven(dtype: torch.dtype) -> None:
    """The product with a weight as it is packed, with the tiles taken untimed."""
    kind = product.TiledWeight if dtype == torch.int8 else product.TiledFloats
    weight = kind.pack(_like(_UNEVEN, 4096), _like(4096, dtype=torch.float32))
    weight.rows(_like(4096, _UNEVEN), _like(2048, dtype=torch.int64), position=None, onto=_like(4096, 4096))


def measure(capability: int, *, quick: bool = False) -> Iterator[dict[str, Any]]:
    """A row for each launch."""
    for name, launch in launched(capability, quick=quick):
        kernel = compiled(capability, launch)
        found = sorted(set(re.findall(_MULTIPLIES, kernel.asm["ptx"])))
        yield {
            "kernel": name,
            "capability": capability,
            **assembled(kernel, capability),
            "shared_bytes": int(kernel.metadata.shared),
            "warps": int(kernel.metadata.num_warps),
            "instruction": found[0] if found else "",
            "triton": metadata.version("triton"),
        }


def complaints(row: dict[str, Any], known: dict[tuple[str, str, int], dict[str, Any]]) -> list[str]:
    """What is wrong with a row: it spills, does not fit, has grown, or multiplies something else than 8 bits."""
    said = [f"spills {row['spilled_bytes']} bytes"] if row["spilled_bytes"] else []
    if row["shared_bytes"] > SHARED[row["capability"]]:
        said.append(f"takes {row['shared_bytes']} bytes of shared memory of {SHARED[row['capability']]}")
    few = "16 x " in row["kernel"] and "float8" in row["kernel"]  # for so few rows Triton multiplies in float16
    if "product" in row["kernel"] and not few and not re.search(_8_BITS, row["instruction"]):
        said.append(f"multiplies by {row['instruction'] or 'no matrix instruction'}")
    versions = {version for version, *_ in known}
    version = row["triton"] if row["triton"] in versions else newest(versions)
    before = known.get((version, row["kernel"], row["capability"]))
    for what in ("registers", "shared_bytes"):
        if before is not None and row[what] > MOST * before[what]:
            said.append(f"takes {row[what]} {what}, {before[what]} before")
    return [f"{row['kernel']} for {row['capability']}: {text}" for text in said]


def newest(versions: Iterable[str]) -> str:
    """The newest of these versions of Triton; '' if there are none."""
    return max(versions, key=Version, default="")


def known_rows() -> dict[tuple[str, str, int], dict[str, Any]]:
    return {(row["triton"], row["kernel"], row["capability"]): row for row in rows.found(ROWS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed rows instead of writing them")
    parser.add_argument(
        "--quick", action="store_true", help="only sm_80 and sm_90, and of the products the usual tiles"
    )
    args = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as before Triton 3.10; 3.9 warns where nothing is said
    found = [row for it in ((80, 90) if args.quick else CAPABILITIES) for row in measure(it, quick=args.quick)]
    said = [text for row in found for text in complaints(row, known_rows() if args.check else {})]
    print("\n".join(said) or f"{len(found)} kernels, none spills")
    if args.check:
        sys.exit(1 if said else 0)
    version, machine = metadata.version("triton"), rows.conditions()
    others = [row for row in rows.found(ROWS) if row["triton"] != version]
    rows.write(ROWS, [*others, *({**row, **machine} for row in found)])


if __name__ == "__main__":
    main()
