"""Write the tables of README.md and the docs from committed rows: `python benchmarks/tables.py`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; nothing between them is written by hand.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import rows
from celora.train.demo import REFRESH_EVERY, DemoRow, summary

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/how-it-works.md")


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def demo() -> str:
    """The demo: accuracy over seeds, time per step, FLOPs."""
    found = [DemoRow(**row) for row in rows.read(rows.RESULTS / "demo.jsonl")]
    table = _markdown(
        ["", "held-out accuracy (range over seeds)", "time per step", "frozen backward, FLOPs"], summary(found)
    )
    last = found[-1]
    seeds = len({row.seed for row in found})
    return (
        f"{table}\n\nSmolLM2-135M-Instruct ({last.dtype}), {last.steps} steps of 16 sentences, "
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
                f"{of[0]['cost']:.2f}",
                f"{statistics.mean(cosines):.2f} ({min(cosines):.2f} to {max(cosines):.2f})",
                f"{statistics.mean(row['relative_error'] for row in of):.2f}",
            ]
        )
    return _markdown(["setting", "selection", "FLOPs", "cosine (range over seeds)", "relative error"], body)


def estimators() -> str:
    """Time of each estimate over the dense product, by shape."""
    found = rows.read(rows.RESULTS / "estimators-bfloat16.jsonl")
    names = [name for name in dict.fromkeys(row["estimator"] for row in found) if name != "dense"]
    shapes = dict.fromkeys((row["out"], row["in"]) for row in found)
    ratio = {(row["out"], row["in"], row["estimator"]): row["ratio"] for row in found}
    body = [[f"{out} x {inp}", *(f"{ratio[out, inp, name]:.2f}" for name in names)] for out, inp in shapes]
    one = found[0]
    return (
        _markdown(["out x in", *names], body)
        + f"\n\nT = {one['tokens']}, {one['dtype']}, {one['threads']} threads, {one['cpu']}, torch {one['torch']}."
    )


TABLES: dict[str, Callable[[], str]] = {"demo": demo, "fidelity": fidelity, "estimators": estimators}


def render(text: str) -> str:
    """The page with every table made anew."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


def main() -> None:
    for name in PAGES:
        page = ROOT / name
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
