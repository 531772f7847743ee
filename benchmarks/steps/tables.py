"""Tables and the picture of whole training steps: their time, parts and memory, over those of PEFT."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.steps import gpu
from benchmarks.steps.dtypes import DTYPES
from benchmarks.steps.fast import SHAPES
from celora.studies.cells import told

HERE = Path(__file__).parent
_WITHOUT_PLAN = ("exact", "auto", "fast")


def _fast(*, amx: bool = False, isa: str | None = None, **wanted: str) -> list[dict[str, Any]]:
    """Rows of the presets of celora. `isa`: the newest instructions that oneDNN was allowed, None for all."""
    found = rows.select(HERE / "fast.jsonl", amx=amx, **wanted)
    return [row for row in found if row.get("onednn_max_cpu_isa") == isa]


def step_fast(*, amx: bool = False, isa: str | None = None) -> str:
    """Speed-up over PEFT of the presets of celora; one table for each machine."""
    found = _fast(amx=amx, isa=isa)
    machines = dict.fromkeys(map(rows.where, found))
    return "\n\n".join(_over_peft([row for row in found if rows.where(row) == machine]) for machine in machines)


def _over_peft(found: list[dict[str, Any]]) -> str:
    body: list[list[str]] = []
    cells = dict.fromkeys((row["model"], row["data"], row["dtype"]) for row in found)
    for key in sorted(cells, key=lambda cell: cell[2], reverse=True):  # float32 first
        by_arm = {row["arm"]: row for row in found if (row["model"], row["data"], row["dtype"]) == key}
        speed = [f"{by_arm[arm]['speed_up']:.2f}" for arm in _WITHOUT_PLAN]
        memory = [f"{by_arm[arm]['peak_memory'] / by_arm['PEFT']['peak_memory']:.2f}" for arm in _WITHOUT_PLAN]
        body.append([*key, f"{by_arm['PEFT']['time_ms']:.0f} ms", *speed, " / ".join(memory)])
    header = ["model", "data", "dtype", "PEFT", *_WITHOUT_PLAN, f"peak memory over PEFT's, {' / '.join(_WITHOUT_PLAN)}"]
    return (
        rows.markdown(header, body)
        + f"\n\nRatios of medians in one run, float32 adapters (r = 16 on all linear layers), {rows.where(found[0])}. "
        + told(row["model"] for row in found)
    )


def step_dtypes() -> str:
    """Speed-up over PEFT in float32, of steps in float32 and in bfloat16 on a CPU that does not multiply bfloat16."""
    found = rows.read(HERE / "dtypes.jsonl")
    body = []
    for key in dict.fromkeys((row["model"], row["data"]) for row in found):
        by_arm = {(row["arm"], row["dtype"]): row for row in found if (row["model"], row["data"]) == key}
        speed = [f"{by_arm[arm, dtype]['speed_up']:.2f}" for arm in _WITHOUT_PLAN for dtype in DTYPES]
        body.append([*key, f"{by_arm['PEFT', 'float32']['time_ms']:.0f} ms", *speed])
    header = ["model", "data", "PEFT, float32", *(f"{arm}, {dtype}" for arm in _WITHOUT_PLAN for dtype in DTYPES)]
    return rows.markdown(header, body) + f"\n\nRatios of medians in one run, {rows.where(found[0])}."


def adapter() -> str:
    """Seconds from the start of the command to the saved adapter, and over preset `off`: medians over turns."""
    found = rows.read(HERE / "adapter.jsonl")
    presets = list(dict.fromkeys(row["preset"] for row in found))
    body = []
    for machine, steps in sorted({(rows.where(row), row["steps"]) for row in found}):
        matching = [row for row in found if (rows.where(row), row["steps"]) == (machine, steps)]
        times = [[row["adapter_s"] for row in matching if row["preset"] == name] for name in presets]
        plain, *others = (statistics.median(seconds) if seconds else None for seconds in times)
        assert plain is not None
        ratios = ("" if other is None else f"{other:.1f} s, {other / plain:.2f}" for other in others)
        body.append([machine, f"{steps:,}", str(len(times[0])), f"{plain:.1f} s", *ratios])
    return rows.markdown(["", "steps", "turns", *presets], body) + f"\n\nMedians over turns, {found[0]['dtype']}."


def compiled() -> str:
    """What torch.compile does to the step of each configuration, and what a refresh does to its graphs."""
    found = rows.read(HERE / "compiled.jsonl")
    by_arm = {(row["measured_with"], row["arm"]): row for row in found}
    body = []
    for arm in dict.fromkeys(row["measured_with"] for row in found):
        plain, eager, graphed = (by_arm[arm, name] for name in ("PEFT", arm, f"{arm} + compile"))
        peft = by_arm[arm, "PEFT + compile"]
        cells = [arm, *(f"{plain['time_ms'] / row['time_ms']:.2f}" for row in (peft, eager, graphed))]
        cells += [f"{row['refresh_ms'] / row['time_ms']:.2f}" for row in (eager, graphed)]
        body.append([*cells, *(str(graphed[key]) for key in ("graphs", "graphs_added_later", "graph_breaks"))])
    one = found[0]
    header = ["", "PEFT + compile", "eager", "compiled", "its refresh, eager", "its refresh, compiled"]
    return (
        rows.markdown([*header, "graphs", "added at later refreshes", "graph breaks"], body)
        + "\n\nSpeed-up of the median step over plain eager PEFT in the same run. A refresh is in steps of its arm. "
        f"A Llama of random weights, hidden size {one['hidden']}, {one['blocks']} blocks, "
        f"{one['tokens']} tokens, every one labelled; {one['dtype']}, {rows.where(one)}, inductor; "
        f"a refresh every {one['refresh_every']} steps, and the faster counts."
    )


def gpu_steps() -> str:
    """Whole steps on a GPU: time, memory, and both over TRL + PEFT's; a table for each GPU."""
    return _by_gpu(_gpu_steps)


def gpu_waits() -> str:
    """How often a step of each arm waits for the GPU."""
    return _by_gpu(_gpu_waits)


def _by_gpu(table: Callable[[list[dict[str, Any]]], str]) -> str:
    found = rows.found(gpu.ROWS)
    devices = dict.fromkeys(map(rows.on_gpu, found))
    return "\n\n".join(table([row for row in found if rows.on_gpu(row) == name]) for name in devices) or rows.NOT_YET


def _gpu_steps(found: list[dict[str, Any]]) -> str:
    body = []
    for cell in dict.fromkeys((row["model"], row["data"]) for row in found):
        by_arm = {row["arm"]: row for row in found if (row["model"], row["data"]) == cell}
        time_ms = {arm: row["time_ms"] for arm, row in by_arm.items() if "time_ms" in row}
        plain, limit = time_ms.get(gpu.BASE), time_ms.get("limit of exact")
        for arm in (arm for arm in gpu.ARMS if arm in by_arm):
            row = by_arm[arm]
            if "not_run" in row:
                body.append([*cell, arm, f"not run: {row['not_run']}", *[""] * 7])
                continue
            own = time_ms[arm]
            over = [f"{time_ms[base] / own:.2f}" if base in time_ms else "" for base in (gpu.BASE, gpu.LIGER)]
            reached = f"{(plain - own) / (plain - limit):.0%}" if plain and limit and limit < plain else ""
            memory = f"{row['peak_memory'] / by_arm[gpu.BASE]['peak_memory']:.2f}" if plain else ""
            spread = f"{row['p20_ms']:.1f} to {row['p80_ms']:.1f}"
            cells = [f"{own:.1f}", spread, f"{row['tokens_per_second']:,.0f}", *over, reached]
            body.append([*cell, arm, *cells, f"{row['peak_memory'] / 2**30:.1f}", memory])
    header = ["model", "data", "arm", "ms/step", "20 to 80 %", "tokens/s", f"speed-up over {gpu.BASE}"]
    arms = " ".join(f"{arm}: {what}." for arm, what in gpu.ARMS.items())
    versions = ", ".join(f"{name} {found[0][name]}" for name in ("trl", "peft", "transformers"))
    return rows.markdown(
        [*header, f"over {gpu.LIGER}", "share of the limit", "peak, GiB", f"over {gpu.BASE}"], body
    ) + (
        f"\n\nMedians of {gpu.REPEATS} steps, arms one after the other. {found[0]['dtype']} base, float32 adapters "
        f"(r = 16 on all linear layers), at most {found[0]['tokens']:,} tokens. {arms} "
        "Peak: what torch allocates at most, model and optimizer included. "
        f"{told(row['model'] for row in found)} {rows.on_gpu(found[0])}, {versions}."
    )


def _gpu_waits(found: list[dict[str, Any]]) -> str:
    counted = {
        (row["model"], row["data"], row["arm"]): str(row["waits"]) for row in found if row.get("waits") is not None
    }
    cells = list(dict.fromkeys(key[:2] for key in counted))
    arms = [arm for arm in gpu.ARMS if any(key[2] == arm for key in counted)]
    body = [[arm, *(counted.get((*cell, arm), "") for cell in cells)] for arm in arms]
    return rows.markdown(["", *(f"{model}, {data}" for model, data in cells)], body) + (
        f"\n\nOne step, forward, backward and optimizer, its batch on the GPU already. {rows.on_gpu(found[0])}."
    )


def speed_up(arm: str, dtype: str, *, data: tuple[str, ...], isa: str | None = None) -> str:
    """The least and the most speed-up of an arm over PEFT in these rows, of all machines: for a sentence."""
    found = _fast(dtype=dtype, arm=arm, isa=isa)
    ratios = [row["speed_up"] for row in found if row["data"] in data]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def one_speed_up(arm: str, dtype: str, model: str, data: str) -> str:
    """The speed-up of an arm over PEFT in one cell, on each machine: for a sentence."""
    found = [row for row in _fast(dtype=dtype, arm=arm) if (row["model"], row["data"]) == (model, data)]
    by_machine = {rows.where(row): f"{row['speed_up']:.2f}" for row in found}
    assert 0 < len(by_machine) == len(found)
    return " and ".join(by_machine.values())


def speed_up_picture() -> str:
    """Bars of the speed-up over PEFT of the presets of celora, for each model, kind of data and dtype.

    The machine is the one that was measured last.
    """
    found = _fast()
    found = [row for row in found if rows.where(row) == rows.where(found[-1])]
    cells = list(dict.fromkeys((row["dtype"], row["model"], row["data"]) for row in found))
    cells.sort(key=lambda cell: cell[0], reverse=True)  # float32 first
    speed = {(row["dtype"], row["model"], row["data"], row["arm"]): row["speed_up"] for row in found}
    width, left, top, bar, gap, legend = 720, 230, 46, 11, 11, 78
    height = top + len(cells) * (len(_WITHOUT_PLAN) * bar + gap) + legend
    bottom, most = height - legend, max(speed.values())

    def x_of(ratio: float) -> float:
        return left + ratio * (width - left - 50) / most

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        "<style>.page{fill:#fff}text{fill:#222}.grid{stroke:#ddd}.one{stroke:#777}",
        ".exact{fill:#56b4e9}.auto{fill:#d55e00}.fast{fill:#009e73}",
        "@media (prefers-color-scheme:dark){.page{fill:#161b22}text{fill:#eee}.grid{stroke:#333}}</style>",
        f'<rect class="page" width="{width}" height="{height}"/>',
        f'<text x="{left}" y="18" font-size="14">Speed-up of a whole training step over PEFT</text>',
    ]
    for i, name in enumerate(_WITHOUT_PLAN):
        x = left + 90 * i
        parts.append(
            f'<rect class="{name}" x="{x}" y="27" width="10" height="10"/><text x="{x + 15}" y="36">{name}</text>'
        )
    for tick in range(int(most) + 1):
        x, kind = x_of(tick), "one" if tick == 1 else "grid"
        parts.append(f'<line class="{kind}" x1="{x:.0f}" y1="{top}" x2="{x:.0f}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.0f}" y="{bottom + 16}" text-anchor="middle">{tick}</text>')
    for i, (dtype, model, data) in enumerate(cells):
        y = top + gap / 2 + i * (len(_WITHOUT_PLAN) * bar + gap)
        name = f"{dtype}, {model}, {data}"
        parts.append(f'<text x="{left - 10}" y="{y + 1.5 * bar + 4:.0f}" text-anchor="end">{name}</text>')
        for j, arm in enumerate(_WITHOUT_PLAN):
            ratio, at = speed[dtype, model, data, arm], y + j * bar
            parts.append(
                f'<rect class="{arm}" x="{left}" y="{at:.0f}" width="{x_of(ratio) - left:.0f}" height="{bar - 1}"/>'
                f'<text x="{x_of(ratio) + 5:.0f}" y="{at + bar - 2:.0f}" font-size="10">{ratio:.2f}</text>'
            )
    parts.append(f'<text x="{left}" y="{bottom + 34}" font-size="11">{rows.where(found[0])}</text>')
    parts.append(
        f'<text x="{left}" y="{bottom + 50}" font-size="11">h...: random weights; 8 blocks (h1024) or 4 (h2048)</text>'
        f'<text x="{left}" y="{bottom + 66}" font-size="11">full: every token labelled; demo, instruct: padding and '
        "unlabelled tokens</text>"
    )
    return "\n".join([*parts, "</svg>", ""])


_DATA = {"labelled": ("full",), "ragged": ("demo", "instruct")}
VALUES: dict[str, Callable[[], str]] = {
    f"speed_{arm}_{dtype}_{which}": functools.partial(speed_up, arm, dtype, data=data)
    for arm in _WITHOUT_PLAN
    for dtype in ("float32", "bfloat16")
    for which, data in _DATA.items()
}
VALUES |= {
    f"speed_fast_{dtype}_{model.partition('-')[0]}_{data}": functools.partial(one_speed_up, "fast", dtype, model, data)
    for dtype in ("float32", "bfloat16")
    for model, data in SHAPES
}
VALUES |= {
    f"speed_{arm}_{limit}_{which}": functools.partial(speed_up, arm, "float32", data=data, isa=isa)
    for arm in _WITHOUT_PLAN
    for limit, isa in (("avx2", "AVX2"), ("avxvnni", "AVX2_VNNI"))
    for which, data in _DATA.items()
}
PICTURES: dict[str, Callable[[], str]] = {"speed-up.svg": speed_up_picture}
TABLES: dict[str, Callable[[], str]] = {
    "step_fast": step_fast,
    "step_fast_amx": functools.partial(step_fast, amx=True),
    "step_avx2": functools.partial(step_fast, isa="AVX2"),
    "step_avxvnni": functools.partial(step_fast, isa="AVX2_VNNI"),
    "adapter": adapter,
    "step_dtypes": step_dtypes,
    "compiled": compiled,
    "gpu_steps": gpu_steps,
    "gpu_waits": gpu_waits,
}
