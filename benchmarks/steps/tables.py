"""Tables and the picture of whole training steps: their time, parts and memory, over those of PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks import rows
from celora.studies.bench import told

HERE = Path(__file__).parent
_SHOWN = ("PEFT + compile", "PEFT upper half", "exact", "exact + compile", "paper", "auto", "limit", "limit of exact")


def step() -> str:
    """Speed-up of the whole step over PEFT under Trainer: one line for each model and kind of data, bfloat16."""
    return _step("bfloat16", amx=False)


def step_float32() -> str:
    """The same in float32."""
    return _step("float32", amx=False)


def step_amx() -> str:
    """The same in bfloat16 on a CPU with matrix instructions."""
    return _step("bfloat16", amx=True)


def _step(dtype: str, *, amx: bool) -> str:
    found = rows.select(HERE / "step.jsonl", dtype=dtype, amx=amx)
    body = []
    shown = [arm for arm in _SHOWN if any(row["arm"] == arm for row in found)]
    for key in dict.fromkeys((row["model"], row["data"]) for row in found):
        of = {row["arm"]: row for row in found if (row["model"], row["data"]) == key}
        speed = [f"{of[arm]['speed_up']:.2f}" if "speed_up" in of.get(arm, {}) else "" for arm in shown]
        memory = [f"{of[arm]['peak_memory'] / of['PEFT']['peak_memory']:.2f}" for arm in ("exact", "auto")]
        time_ms = {arm: row["time_ms"] for arm, row in of.items() if "time_ms" in row}
        most = time_ms["PEFT"] - time_ms["limit of exact"]
        reached = [f"{(time_ms['PEFT'] - time_ms[arm]) / most:.0%}" for arm in ("exact", "paper", "auto")]
        body.append([*key, f"{time_ms['PEFT']:.0f} ms", *speed, " / ".join(reached), " / ".join(memory)])
    one = found[0]
    reach = "share of the limit of exact: exact / paper / auto"
    header = ["model", "data", "PEFT", *shown, reach, "peak memory, exact / auto"]
    absent = {row["arm"]: row["not_run"] for row in found if "not_run" in row}
    left_out = "; ".join(f"{arm}: {reason}" for arm, reason in absent.items())
    again = dict.fromkeys(row["model"] for row in found if "memory_commit" in row)
    later = f" (peak memory of {', '.join(again)} in another, later)" if again else ""
    return (
        rows.markdown(header, body)
        + f"\n\nRatios of medians in one run{later}, {one['dtype']} base, float32 adapters (r = 16 on all linear "
        f"layers), {rows.where(one)}. {told(row['model'] for row in found)} Not run: {left_out}."
    )


def step_parts() -> str:
    """Where the time and the memory of a step go, on a CPU with matrix instructions."""
    found = [row for row in rows.select(HERE / "step.jsonl", amx=True) if "time_ms" in row]
    body = []
    for row in found:
        if row["arm"] in ("PEFT", "exact", "auto"):
            peak = f"{row['peak_memory'] / 2**20:.0f}"
            parts = [f"{row[part]:.0f}" for part in ("forward_ms", "backward_ms", "optimizer_ms")]
            spread = f"{row['p20_ms']:.0f} to {row['p80_ms']:.0f}"
            saved = f"{row['saved_for_backward'] / 2**20:.0f}"
            name = [row["model"], row["data"], row["arm"]]
            body.append(
                [*name, f"{row['time_ms']:.0f}", spread, *parts, f"{row['tokens_per_second']:.0f}", saved, peak]
            )
    header = ["model", "data", "arm", "ms/step", "20/80th percentile", "forward", "backward", "optimizer", "tokens/s"]
    return rows.markdown([*header, "MiB saved for backward", "MiB peak"], body) + (
        f"\n\n{told(row['model'] for row in found)}"
    )


def step_sweep() -> str:
    """How the cost grows with the tokens of a step and with the hidden size."""
    return _step_sweep(amx=False)


def step_sweep_amx() -> str:
    """The same on a CPU with matrix instructions."""
    return _step_sweep(amx=True)


def _step_sweep(*, amx: bool) -> str:
    found = [row for row in rows.select(HERE / "step-sweep.jsonl", amx=amx) if "time_ms" in row]
    body = []
    for cell in dict.fromkeys(tuple(row["cell"]) for row in found):
        of = {row["arm"]: row for row in found if tuple(row["cell"]) == cell}
        plain = of["PEFT"]
        speed = [f"{of[arm]['speed_up']:.2f}" for arm in ("exact", "paper", "auto", "limit")]
        body.append([cell[0], str(plain["tokens"]), f"{plain['time_ms']:.0f} ms", *speed])
    return rows.markdown(["model", "tokens per step", "PEFT", "exact", "paper", "auto", "limit"], body) + (
        f"\n\n{rows.where(found[0])}. {told(row['cell'][0] for row in found)}"
    )


def refresh() -> str:
    """What refreshing costs."""
    found = rows.read(HERE / "refresh.jsonl")
    body = [
        [
            row["arm"],
            f"{row['first_over_median']:.2f}",
            f"{row['slowest_over_median']:.2f}",
            f"{row['slowest_without_refresh']:.2f}",
            f"{row['share_at_default_interval']:.1%}",
        ]
        for row in found
    ]
    header = [
        "",
        "first step / median",
        "slowest later step / median",
        "the same, no refreshes",
        "share of the time, every 200",
    ]
    return rows.markdown(header, body) + (
        f"\n\nSmolLM2-135M ({rows.UNPACKED}), 4 x 128 tokens, bfloat16, 2 threads, {found[0]['cpu']}."
    )


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
        + "\n\nSpeed-up of the median step over plain eager PEFT in the same run; refreshes in steps of their own arm. "
        f"A Llama of random weights, hidden size {one['hidden']}, {one['blocks']} blocks, "
        f"{one['tokens']} tokens, every one labelled; {one['dtype']}, {rows.where(one)}, inductor; "
        f"refreshes every {one['refresh_every']} steps, of which the faster counts."
    )


TABLES: dict[str, Callable[[], str]] = {
    "step": step,
    "step_float32": step_float32,
    "step_amx": step_amx,
    "step_parts": step_parts,
    "step_sweep": step_sweep,
    "step_sweep_amx": step_sweep_amx,
    "refresh": refresh,
    "compiled": compiled,
}
