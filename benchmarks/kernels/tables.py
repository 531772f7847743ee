"""Tables of one layer: what an estimate takes over the dense product, by shape and by kind of quantisation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.kernels import gpu

HERE = Path(__file__).parent


def estimators() -> str:
    """Time of each estimate over the dense product, by shape."""
    found = rows.select(HERE / "estimators.jsonl", amx=False, dtype="bfloat16")
    names = [name for name in dict.fromkeys(row["estimator"] for row in found) if name != "dense"]
    shapes = [f"{out} x {inp}" for out, inp in dict.fromkeys((row["out"], row["in"]) for row in found)]
    ratio = {(f"{row['out']} x {row['in']}", row["estimator"]): row["ratio"] for row in found}
    body = [[name, *(f"{ratio[shape, name]:.2f}" for shape in shapes)] for name in names]
    one = found[0]
    return rows.markdown(["", *shapes], body) + f"\n\nT = {one['tokens']}, {one['dtype']}, {rows.where(one)}."


def quantised_layer() -> str:
    """Estimates on one frozen 4-bit layer: backward time, memory, error."""
    return _quantised("layer")


def quantised_stack() -> str:
    """The same on four layers with LoRA."""
    return _quantised("stack")


def quantised_kinds() -> str:
    """One layer of every kind of quantisation: what its own backward takes, and the estimates' over that."""
    found = rows.read(HERE / "quantised-kinds.jsonl")
    body = []
    for kind in dict.fromkeys(row["kind"] for row in found):
        by_estimator = {row["estimator"]: row for row in found if row["kind"] == kind}
        plain, *estimates = by_estimator.values()
        cells = [f"{row['speed_up']:.2f} / {row['memory']:.2f}" for row in estimates]
        body.append([kind, f"{plain['time_ms']:.1f} ms, {plain['step_bytes'] / 2**20:.0f} MiB", *cells])
    one, names = found[0], list(dict.fromkeys(row["estimator"] for row in found))
    packages = ", ".join(dict.fromkeys(row["package"] for row in found))
    return (
        rows.markdown(["", "its own backward", *names[1:]], body)
        + "\n\nSpeed-up of the backward / peak of forward and backward with what is kept, over its own. "
        f"{one['out']} x {one['in']}, T = {one['tokens']}, {one['dtype']}, {rows.where(one)}, {packages}."
    )


def gpu_kernels() -> str:
    """Time of each Triton kernel, of torch's operators and of the product in bfloat16; a table for each GPU."""
    found = rows.found(gpu.ROWS)
    return (
        "\n\n".join(
            _gpu_kernels([row for row in found if rows.on_gpu(row) == device])
            for device in dict.fromkeys(map(rows.on_gpu, found))
        )
        or rows.NOT_YET
    )


def _gpu_kernels(found: list[dict[str, Any]]) -> str:
    body = []
    for row in found:
        if "not_run" in row:
            body.append([row["model"], row["operation"], f"not run: {row['not_run']}", *[""] * 3])
            continue
        times = (row["times"].get(name) for name in ("triton", "torch", "bfloat16"))
        cells = ["" if time is None else f"{1e3 * time['time_ms']:,.0f}" for time in times]
        body.append([row["model"], row["operation"], *cells, "yes" if row["used"] else "no"])
    return rows.markdown(["Llama", "", "Triton, µs", "torch, µs", "bfloat16, µs", "used by celora"], body) + (
        f"\n\nMedians of {gpu.REPEATS} turns, without the time to launch. {found[0]['tokens']:,} tokens, bfloat16, "
        "`up_proj` and the head. `pack_weight` and `pack_floats`: the product of every second row of the gradient. "
        f"`pack_both_ways`: that, and the forward's. {rows.on_gpu(found[0])}."
    )


def _quantised(what: str) -> str:
    found = [row for row in rows.read(HERE / "quantised.jsonl") if row["what"] == what]
    shapes, plain = list(dict.fromkeys((row["out"], row["in"]) for row in found)), found[0]["estimator"]
    body = []
    for name in dict.fromkeys(row["estimator"] for row in found):
        by_shape = {(row["out"], row["in"]): row for row in found if row["estimator"] == name}
        cells = [name]
        for shape in shapes:
            row = by_shape[shape]
            cells.append(f"{row['time_ms']:.1f} ms" if name == plain else f"{row['speed_up']:.2f}")
        for shape in shapes:
            row = by_shape[shape]
            peak = f"{row['peak_bytes'] / 2**20:.0f} MiB" if name == plain else f"{row['memory']:.2f}"
            cells.append(peak)
        cells.append(" / ".join(f"{by_shape[shape]['kept_bytes'] / 2**20:.1f}" for shape in shapes))
        if what == "layer":
            cells.append(f"{by_shape[shapes[-1]]['relative_error']:.3f}")
        body.append(cells)
    names = [f"{out} x {inp}" for out, inp in shapes]
    header = ["", *(f"{n}, speed-up" for n in names), *(f"{n}, peak" for n in names), "kept, MiB"]
    one = found[0]
    return (
        rows.markdown([*header, "relative error"] if what == "layer" else header, body)
        + f"\n\nT = {one['tokens']}, bfloat16, {rows.where(one)}, "
        f"bitsandbytes {one['bitsandbytes']}. Peaks over plain's; kept from step to step at each shape."
    )


TABLES: dict[str, Callable[[], str]] = {
    "gpu_kernels": gpu_kernels,
    "estimators": estimators,
    "quantised_layer": quantised_layer,
    "quantised_stack": quantised_stack,
    "quantised_kinds": quantised_kinds,
}
