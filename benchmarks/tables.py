"""Write the tables and pictures of README.md and the docs from committed rows: `python benchmarks/tables.py`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, a number in a sentence between `<!-- value: NAME -->`
and `<!-- end -->`; nothing between them is written by hand.
"""

from __future__ import annotations

import functools
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bfloat16_tables
import quality_tables
import rows
import sensitivity
from celora.studies.bench import Cell, shape_config, told
from celora.studies.demo import REFRESH_EVERY, DemoRow, summary

ROOT = Path(__file__).parent.parent
UNPACKED = "weights unpacked from 4 bits"  # of the demo's model, which comes as a Q4_1 file


def demo() -> str:
    """The demo: accuracy over seeds, time per step, FLOPs."""
    found = [DemoRow(**row) for row in rows.read(rows.RESULTS / "demo.jsonl")]
    table = rows.markdown(
        ["", "held-out accuracy (range over seeds)", "time per step", "frozen backward, FLOPs"], summary(found)
    )
    last = found[-1]
    seeds = len({row.seed for row in found})
    return (
        f"{table}\n\nSmolLM2-135M-Instruct ({UNPACKED}; {last.dtype}), {last.steps} steps of 8 sentences, "
        f"{last.held_out} held-out sentences, {seeds} seeds, {last.threads} CPU threads, torch {last.torch}. "
        f"CE-LoRA is the preset `paper`, refreshed every {REFRESH_EVERY} steps."
    )


def fidelity() -> str:
    """What each setting keeps of the LoRA gradient."""
    found = rows.read(rows.RESULTS / "fidelity.jsonl")
    body = []
    for key in dict.fromkeys((row["setting"], row["selection"]) for row in found):
        of = [row for row in found if (row["setting"], row["selection"]) == key]
        cosines = [row["cosine"] for row in of]
        body.append(
            [
                key[0],
                key[1],
                f"{'≤ ' if 'energy' in key[0] else ''}{of[0]['cost']:.2f}",  # how many tokens hold a share, data say
                f"{statistics.mean(cosines):.2f} ({min(cosines):.2f} to {max(cosines):.2f})",
                f"{statistics.mean(row['relative_error'] for row in of):.2f}",
            ]
        )
    return rows.markdown(["setting", "selection", "FLOPs", "cosine (range over seeds)", "relative error"], body)


def estimators() -> str:
    """Time of each estimate over the dense product, by shape."""
    return _estimators("estimators-bfloat16.jsonl")


def with_amx() -> str:
    """The same on a CPU with matrix instructions."""
    return _estimators("estimators-bfloat16-amx.jsonl")


def _estimators(file: str) -> str:
    found = rows.read(rows.RESULTS / file)
    names = [name for name in dict.fromkeys(row["estimator"] for row in found) if name != "dense"]
    shapes = [f"{out} x {inp}" for out, inp in dict.fromkeys((row["out"], row["in"]) for row in found)]
    ratio = {(f"{row['out']} x {row['in']}", row["estimator"]): row["ratio"] for row in found}
    body = [[name, *(f"{ratio[shape, name]:.2f}" for shape in shapes)] for name in names]
    one = found[0]
    return rows.markdown(["", *shapes], body) + f"\n\nT = {one['tokens']}, {one['dtype']}, {rows.where(one)}."


def frontier() -> str:
    """Plans: what was asked for, what was audited, what it takes."""
    return _frontier("bfloat16")


def frontier_amx() -> str:
    """The same where the CPU has matrix instructions."""
    return _frontier("bfloat16-amx")


def frontier_float32() -> str:
    """The same on a CPU that emulates bfloat16, against the float32 products that are the fast ones there."""
    return _frontier("float32")


def _frontier(which: str) -> str:
    file = rows.RESULTS / f"frontier-{which}.jsonl"
    if not file.exists():
        return "Not measured yet."
    found = rows.read(file)
    body = []
    for row in found:
        labels = "all" if not row["masked"] else f"{1 - row['masked']:.0%}"
        cells = [row["model"], labels, f"{row['fidelity']:g}", f"{row['predicted_cosine']:.3f}"]
        body.append([*cells, f"{row['audited_cosine']:.3f}", f"{row['audited_time']:.2f}"])
    one = found[0]
    return (
        rows.markdown(["model", "labelled", "asked for", "predicted", "audited cosine", "grad_input time"], body)
        + f"\n\nT = {one['tokens']}, {one['dtype']}, {rows.where(one)}; "
        f"8-bit copies of the weights without a limit. {_shapes_of_frontier(found)} Audited on "
        f"{_audited_on(found)}, which also decided whether to allow less error."
    )


def _shapes_of_frontier(found: list[dict[str, Any]]) -> str:
    """What the models of `frontier.py` are, in words."""
    hidden = shape_config(Cell("h2048-v32k", "full"))
    words = {
        "SmolLM2-135M": f"SmolLM2-135M: {UNPACKED}.",
        "hidden 2048": f"Hidden 2048: a Llama of random weights, {hidden.num_hidden_layers} blocks.",
        "hidden 2048, random tokens": "Hidden 2048 with random tokens: random weights, 3 blocks.",
    }
    return " ".join(words[name] for name in dict.fromkeys(row["model"] for row in found))


def _audited_on(found: list[dict[str, Any]]) -> str:
    numbers = {row["audited_batches"] for row in found}
    words = ["one batch" if number == 1 else f"the sum of {number} batches" for number in sorted(numbers)]
    return " or ".join(words)


def training() -> str:
    """Held-out loss after 200 steps, and what is kept of exact LoRA's improvement, at equal steps and equal time."""
    found = rows.read(rows.RESULTS / "training.jsonl")
    times = rows.read(rows.RESULTS / "training-time.jsonl")
    ratios = {row["arm"]: row["ratio"] for row in times}
    exact = {row["seed"]: _losses(row) for row in found if row["arm"] == "exact LoRA"}
    lossless = "preset exact"  # has no losses of its own: it learns what LoRA learns
    if all(row["arm"] != lossless for row in found):
        found += [row | {"arm": lossless} for row in found if row["arm"] == "exact LoRA"]
    body = []
    for arm in dict.fromkeys(["exact LoRA", lossless, *(row["arm"] for row in found)]):
        of = [row for row in found if row["arm"] == arm and row["seed"] in exact]
        kept = _kept(found, arm)
        last, ahead = [], {"exact LoRA": [], lossless: []}
        for row in of:
            losses, reference = _losses(row), exact[row["seed"]]
            end = max(losses)
            last.append(losses[end])
            for rival, by in ahead.items():
                if {arm, rival} <= ratios.keys() and arm != rival and ratios[arm] <= ratios[rival]:
                    by.append(_at(reference, end * ratios[arm] / ratios[rival]) - losses[end])
        body.append(
            [
                arm if len(of) == len(exact) else f"{arm} (seeds: {len(of)})",
                f"{statistics.mean(last):.3f} ({min(last):.3f} to {max(last):.3f})",
                f"{statistics.mean(kept):.1%} ({min(kept):.1%} to {max(kept):.1%})",
                f"{ratios[arm]:.3f}" if arm in ratios else "",
                *(
                    f"{statistics.mean(by):+.3f} ({min(by):+.3f} to {max(by):+.3f})" if by else ""
                    for by in ahead.values()
                ),
            ]
        )
    here, *others = dict.fromkeys(row["cpu"] for row in found)
    elsewhere = [f"{row['arm']} on {row['cpu']}" for row in found if row["cpu"] in others]
    where = "; ".join([here, *dict.fromkeys(elsewhere)])
    return (
        rows.markdown(
            [
                "",
                "held-out loss",
                "share of exact LoRA's improvement",
                "step time",
                "ahead at equal time",
                "of preset exact",
            ],
            body,
        )
        + f"\n\n{len(exact)} seeds, 200 steps of 4 x 128 tokens, bfloat16, {where}. Steps timed in "
        f"turns: {rows.where(times[0])}. Ahead: the loss that exact LoRA, or preset `exact`, which learns the same "
        "faster, has after the same time, minus the arm's; where the arm is not slower, and without the time of "
        "planning. `auto` and `paper` leave out what preset `exact` does, the other arms do not."
    )


def _kept(found: list[dict[str, Any]], arm: str) -> list[float]:
    """The share of exact LoRA's improvement in held-out loss that an arm keeps, seed by seed."""
    exact = {row["seed"]: _losses(row) for row in found if row["arm"] == "exact LoRA"}
    pairs = [(_losses(row), exact[row["seed"]]) for row in found if row["arm"] == arm and row["seed"] in exact]
    return [_share(of, lora, max(of)) for of, lora in pairs]


def _share(of: dict[int, float], lora: dict[int, float], at: int) -> float:
    """Of exact LoRA's improvement until step `at`, both from where LoRA began: CPUs differ in the untouched model's
    loss by a thousandth."""
    return (lora[0] - of[at]) / (lora[0] - lora[at])


def share_kept(arm: str) -> str:
    """That share in a sentence: the mean and the range over the seeds."""
    of = _kept(rows.read(rows.RESULTS / "training.jsonl"), arm)
    return f"{statistics.mean(of):.1%} ({min(of):.1%} to {max(of):.1%}, {len(of)} seeds)"


def time_of_the_default() -> str:
    """How much longer the whole step takes with a plan at the default fidelity than with one at 0.99."""
    ratios = {row["arm"]: row["ratio"] for row in rows.read(rows.RESULTS / "training-time.jsonl")}
    return f"{ratios['auto 0.998'] / ratios['auto 0.99'] - 1:.0%}"


def training_code() -> str:
    """What is kept of exact LoRA's improvement on the source of the standard library, on the way of a longer run."""
    path = rows.RESULTS / "training-code.jsonl"
    if not path.exists():
        return "Not measured yet."
    kinds: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows.read(path):
        kinds.setdefault((row["dtype"], max(_losses(row))), []).append(row)
    return "\n\n".join(map(_training_code, kinds.values()))


def _training_code(found: list[dict[str, Any]]) -> str:
    """Of runs of one length and dtype."""
    one, losses = found[0], {(row["arm"], row["seed"]): _losses(row) for row in found}
    steps = sorted(next(iter(losses.values())))[1:]
    shown = steps[-1 :: -max(1, len(steps) // 5)][::-1]
    body, exact = [], {seed: of for (name, seed), of in losses.items() if name == "exact LoRA"}
    for arm in dict.fromkeys(arm for arm, _ in losses):
        pairs = [(of, exact[seed]) for (name, seed), of in losses.items() if name == arm and seed in exact]
        if not pairs:
            continue
        kept = [statistics.mean(_share(of, lora, at) for of, lora in pairs) for at in shown]
        body.append([arm, str(len(pairs)), *(f"{share:.1%}" for share in kept)])
    return (
        rows.markdown(["share of exact LoRA's improvement", "seeds", *(f"step {at:,}" for at in shown)], body)
        + f"\n\n4 x 128 tokens, {one['dtype']}, {rows.where(one)}."
    )


def refresh() -> str:
    """What refreshing costs."""
    found = rows.read(rows.RESULTS / "refresh.jsonl")
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
        f"\n\nSmolLM2-135M ({UNPACKED}), 4 x 128 tokens, bfloat16, 2 threads, {found[0]['cpu']}."
    )


_SHOWN = ("PEFT + compile", "PEFT upper half", "exact", "exact + compile", "paper", "auto", "limit", "limit of exact")


def step() -> str:
    """Speed-up of the whole step over PEFT under Trainer: one line for each model and kind of data, bfloat16."""
    return _step("bfloat16")


def step_float32() -> str:
    """The same in float32."""
    return _step("float32")


def step_amx() -> str:
    """The same in bfloat16 on a CPU with matrix instructions."""
    return _step("bfloat16", "step-amx.jsonl")


def _step(dtype: str, file: str = "step.jsonl") -> str:
    found = [row for row in rows.read(rows.RESULTS / file) if row["dtype"] == dtype]
    if not found:
        return "Not measured yet."
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
    found = [row for row in rows.read(rows.RESULTS / "step-amx.jsonl") if "time_ms" in row]
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
    return _step_sweep("step-sweep.jsonl")


def step_sweep_amx() -> str:
    """The same on a CPU with matrix instructions."""
    return _step_sweep("step-sweep-amx.jsonl")


def _step_sweep(name: str) -> str:
    file = rows.RESULTS / name
    found = [row for row in rows.found(file) if "time_ms" in row]
    if not found:
        return "Not measured yet."
    body = []
    for cell in dict.fromkeys(tuple(row["cell"]) for row in found):
        of = {row["arm"]: row for row in found if tuple(row["cell"]) == cell}
        plain = of["PEFT"]
        speed = [f"{of[arm]['speed_up']:.2f}" for arm in ("exact", "paper", "auto", "limit")]
        body.append([cell[0], str(plain["tokens"]), f"{plain['time_ms']:.0f} ms", *speed])
    return rows.markdown(["model", "tokens per step", "PEFT", "exact", "paper", "auto", "limit"], body) + (
        f"\n\n{rows.where(found[0])}. {told(row['cell'][0] for row in found)}"
    )


def quantised_layer() -> str:
    """Estimates on one frozen 4-bit layer: backward time, memory, error."""
    return _quantised("layer")


def quantised_stack() -> str:
    """The same on four layers with LoRA."""
    return _quantised("stack")


def quantised_kinds() -> str:
    """One layer of every kind of quantisation: what its own backward takes, and the estimates' over that."""
    file = rows.RESULTS / "quantised-kinds.jsonl"
    if not file.exists():
        return "Not measured yet."
    found = rows.read(file)
    body = []
    for kind in dict.fromkeys(row["kind"] for row in found):
        of = {row["estimator"]: row for row in found if row["kind"] == kind}
        plain, *estimates = of.values()
        cells = [f"{row['speed_up']:.2f} / {row['memory']:.2f}" for row in estimates]
        body.append([kind, f"{plain['time_ms']:.1f} ms, {plain['step_bytes'] / 2**20:.0f} MiB", *cells])
    one, names = found[0], list(dict.fromkeys(row["estimator"] for row in found))
    packages = ", ".join(dict.fromkeys(row["package"] for row in found))
    return (
        rows.markdown(["", "its own backward", *names[1:]], body)
        + "\n\nSpeed-up of the backward / peak of forward and backward with what is kept, over its own. "
        f"{one['out']} x {one['in']}, T = {one['tokens']}, {one['dtype']}, {rows.where(one)}, {packages}."
    )


def _quantised(what: str) -> str:
    found = [row for row in rows.read(rows.RESULTS / "quantised.jsonl") if row["what"] == what]
    shapes, plain = list(dict.fromkeys((row["out"], row["in"]) for row in found)), found[0]["estimator"]
    body = []
    for name in dict.fromkeys(row["estimator"] for row in found):
        of = {(row["out"], row["in"]): row for row in found if row["estimator"] == name}
        cells = [name]
        for shape in shapes:
            row = of[shape]
            cells.append(f"{row['time_ms']:.1f} ms" if name == plain else f"{row['speed_up']:.2f}")
        for shape in shapes:
            row = of[shape]
            peak = f"{row['peak_bytes'] / 2**20:.0f} MiB" if name == plain else f"{row['memory']:.2f}"
            cells.append(peak)
        cells.append(" / ".join(f"{of[shape]['kept_bytes'] / 2**20:.1f}" for shape in shapes))
        if what == "layer":
            cells.append(f"{of[shapes[-1]]['relative_error']:.3f}")
        body.append(cells)
    names = [f"{out} x {inp}" for out, inp in shapes]
    header = ["", *(f"{n}, speed-up" for n in names), *(f"{n}, peak" for n in names), "kept, MiB"]
    one = found[0]
    return (
        rows.markdown([*header, "relative error"] if what == "layer" else header, body)
        + f"\n\nT = {one['tokens']}, bfloat16, {rows.where(one)}, "
        f"bitsandbytes {one['bitsandbytes']}. Peaks over plain's; kept from step to step at each shape."
    )


def compiled() -> str:
    """What torch.compile does to the step of each configuration, and what a refresh does to its graphs."""
    file = rows.RESULTS / "compiled.jsonl"
    found = rows.found(file)
    if not found:
        return "Not measured yet."
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


def two_processes() -> str:
    """Held-out accuracy of the demo in one process and in two."""
    found = rows.read(rows.RESULTS / "two-processes.jsonl")
    seeds = sorted({row["seed"] for row in found})
    body = []
    for arm, way in dict.fromkeys((row["arm"], row["way"]) for row in found):
        of = {row["seed"]: row["accuracy"] for row in found if (row["arm"], row["way"]) == (arm, way)}
        cells = [f"{of[seed]:.1%}" if seed in of else "" for seed in seeds]
        body.append([arm, way, *cells, f"{statistics.mean(of.values()):.1%}"])
    one = found[0]
    return (
        rows.markdown(["", "", *(f"seed {seed}" for seed in seeds), "mean"], body)
        + f"\n\nSmolLM2-135M-Instruct ({UNPACKED}; {one['dtype']}), {one['steps']} steps of {one['batch']} sentences "
        f"in all, {one['held_out']} held-out sentences, torch {one['torch']}, gloo. CE-LoRA is the preset `paper`, "
        f"refreshed every {REFRESH_EVERY} steps; with FSDP2 also `synchronise`."
    )


def _losses(row: dict[str, Any]) -> dict[int, float]:
    return {int(step): loss for step, loss in row["losses"].items()}


def _at(losses: dict[int, float], step: float) -> float:
    """The loss at a step between two that were measured, on the line through them."""
    steps = sorted(losses)
    low = max(i for i, s in enumerate(steps[:-1]) if s <= step)
    along = (step - steps[low]) / (steps[low + 1] - steps[low])
    return losses[steps[low]] + along * (losses[steps[low + 1]] - losses[steps[low]])


def frontier_picture(which: str) -> str:
    """Cosine against time as an SVG: one line for each model and labelling, the asked-for bars as they come."""
    found = rows.read(rows.RESULTS / f"frontier-{which}.jsonl")
    width, height, left, top, right = 720, 360, 60, 20, 220
    low = min(0.75, *(row["audited_cosine"] for row in found))

    def at(time: float, cosine: float) -> tuple[float, float]:
        return left + time * (width - left - right), top + (1 - cosine) / (1 - low) * (height - top - 50)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i in range(6):
        x, y = at(i / 5, low)
        parts.append(f'<line x1="{x:.0f}" y1="{top}" x2="{x:.0f}" y2="{y:.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.0f}" y="{y + 18:.0f}" text-anchor="middle">{i / 5:.1f}</text>')
        x, y = at(0, low + (1 - low) * i / 5)
        parts.append(f'<line x1="{x:.0f}" y1="{y:.0f}" x2="{at(1, low)[0]:.0f}" y2="{y:.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 8:.0f}" y="{y + 4:.0f}" text-anchor="end">{low + (1 - low) * i / 5:.2f}</text>')
    x, y = at(0.5, low)
    parts.append(f'<text x="{x:.0f}" y="{y + 38:.0f}" text-anchor="middle">grad_input time, share of dense</text>')
    parts.append(
        f'<text x="14" y="{height / 2:.0f}" text-anchor="middle" transform="rotate(-90 14 {height / 2:.0f})">'
        "cosine of the LoRA gradient</text>"
    )
    # Okabe and Ito's colours, and a marker of its own for each line: readable without seeing colours.
    styles = [
        ("#0072b2", "5"),
        ("#d55e00", "0"),
        ("#009e73", "5"),
        ("#cc79a7", "0"),
        ("#000000", "5"),
        ("#56b4e9", "0"),
    ]
    lines = list(dict.fromkeys((row["model"], row["masked"]) for row in found))
    for (model, masked), (colour, dash) in zip(lines, styles, strict=False):
        of = sorted(
            (r["audited_time"], r["audited_cosine"]) for r in found if (r["model"], r["masked"]) == (model, masked)
        )
        points = [at(*point) for point in of]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        y = top + 14 + 34 * lines.index((model, masked))
        parts.append(f'<circle cx="{width - right + 10}" cy="{y - 4}" r="4" fill="{colour}"/>')
        labels = "all labelled" if not masked else f"{1 - masked:.0%} labelled"
        parts.append(f'<text x="{width - right + 20}" y="{y}">{model}</text>')
        parts.append(f'<text x="{width - right + 20}" y="{y + 14}" fill="#555">{labels}</text>')
    return "\n".join([*parts, "</svg>", ""])


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "fidelity": fidelity,
    "estimators": estimators,
    "with_amx": with_amx,
    "frontier": frontier,
    "frontier_amx": frontier_amx,
    "frontier_float32": frontier_float32,
    "training": training,
    "training_code": training_code,
    "refresh": refresh,
    "step": step,
    "step_float32": step_float32,
    "step_amx": step_amx,
    "step_parts": step_parts,
    "step_sweep": step_sweep,
    "step_sweep_amx": step_sweep_amx,
    "quantised_layer": quantised_layer,
    "quantised_stack": quantised_stack,
    "quantised_kinds": quantised_kinds,
    "compiled": compiled,
    "two_processes": two_processes,
    "sensitivity_network": sensitivity.NETWORK.table,
    "sensitivity_language_model": sensitivity.LANGUAGE_MODEL.table,
    **quality_tables.TABLES,
    **bfloat16_tables.TABLES,
}
VALUES: dict[str, Callable[[], str]] = {
    "kept_by_auto_998": functools.partial(share_kept, "auto 0.998"),
    "kept_by_auto_99": functools.partial(share_kept, "auto 0.99"),
    "kept_by_auto_98": functools.partial(share_kept, "auto 0.98"),
    "kept_by_the_rule": functools.partial(share_kept, "int8 x tokens 0.99"),
    "time_of_the_default": time_of_the_default,
    "sensitivity_means": functools.partial(sensitivity.NETWORK.furthest, means=True),
    "sensitivity_runs": functools.partial(sensitivity.NETWORK.furthest, means=False),
}
PICTURES: dict[str, Callable[[], str]] = {
    "docs/frontier.svg": functools.partial(frontier_picture, "bfloat16"),
    "docs/frontier-amx.svg": functools.partial(frontier_picture, "bfloat16-amx"),
    "docs/convergence.svg": quality_tables.convergence_picture,
    "docs/sensitivity-network.svg": sensitivity.NETWORK.picture,
    "docs/sensitivity-language-model.svg": sensitivity.LANGUAGE_MODEL.picture,
}


def render(text: str) -> str:
    """The page with every table and every number in a sentence made anew."""
    text = re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )
    return re.sub(
        r"(<!-- value: (\w+) -->).*?(<!-- end -->)", lambda match: f"{match[1]}{VALUES[match[2]]()}{match[3]}", text
    )


def written() -> dict[Path, str]:
    """Every page that has a table, and every picture, as the committed rows make them."""
    pages = {path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}
    return {path: render(text) for path, text in pages.items() if "<!-- end -->" in text} | {
        ROOT / name: picture() for name, picture in PICTURES.items()
    }


def main() -> None:
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
