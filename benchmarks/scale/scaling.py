"""How the time of a LoRA step grows from 1 to 1,000 GPUs: a model of compute, gathering, all-reduce and stragglers.

The bytes that each process gives to collectives follow from shapes. `tests/whole/test_distributed.py` checks them
against counted bytes. The speeds of links and GPUs, and the stragglers, are assumed. Every assumption is an option:
`python -m benchmarks.scale.scaling --help`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

Shape = tuple[int, int]


# --- bytes -----------------------------------------------------------------------------------------------------------


def held(shapes: Iterable[Shape], processes: int, itemsize: int) -> int:
    """Bytes that a process gives to an all-gather of these weights: its shard, by rows, padded to equal sizes."""
    return sum(-(-rows // processes) * columns for rows, columns in shapes) * itemsize


def kept(shapes: Iterable[Shape], keep_ratio: float, processes: int, itemsize: int) -> float:
    """The same for only the kept rows, if they are spread evenly. More if not: the fullest process sets the size."""
    return sum(round(keep_ratio * rows) / processes * columns for rows, columns in shapes) * itemsize


def statistics(layers: Iterable[int]) -> int:
    """Bytes of the all-reduce of `synchronise` at a refresh: the columns' scores of each layer, and three numbers."""
    return sum(4 * (out_features + 3) for out_features in layers)


def sent(collective: str, given: float, processes: int) -> float:
    """Bytes that leave a process in a ring, of an all-gather or a reduction to which it gives `given` bytes."""
    around = {"all_gather": processes - 1, "reduce_scatter": 1 - 1 / processes, "all_reduce": 2 * (1 - 1 / processes)}
    return given * around[collective]


# --- a model on machines ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Llama 3 8B, LoRA r=16 on all linear layers, bfloat16, on nodes of eight H100. Bandwidths are one GPU's share."""

    hidden: int = 4096
    intermediate: int = 14336
    key_value: int = 1024
    layers: int = 32
    vocabulary: int = 128256
    rank: int = 16
    tokens: int = 4096  # of one GPU in one step
    keep_ratio: float = 0.5  # of the rows, in every frozen layer
    eight_bit: float = 0.5  # time of an 8-bit product, as a share of a bfloat16 one's
    refresh_every: int = 200
    flops: float = 400e12  # reached, not the peak
    node: int = 8  # GPUs
    inside: float = 300e9  # bytes a second between GPUs of a node
    between: float = 45e9  # and between nodes
    hop_inside: float = 3e-6  # seconds
    hop_between: float = 15e-6
    jitter: float = 0.01  # standard deviation of a GPU's compute time, as a share of it

    @property
    def frozen(self) -> list[Shape]:
        """Frozen weights under adapters, (out, in)."""
        h, i, kv = self.hidden, self.intermediate, self.key_value
        return [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)] * self.layers

    @property
    def trained(self) -> list[Shape]:
        """The adapters' matrices."""
        return [shape for out, into in self.frozen for shape in ((self.rank, into), (out, self.rank))]


@dataclass(frozen=True)
class Step:
    """Milliseconds of one step."""

    compute: float
    gather: float
    reduce: float
    waiting: float

    @property
    def serial(self) -> float:
        """If nothing overlaps."""
        return self.compute + self.gather + self.reduce + self.waiting

    @property
    def overlapped(self) -> float:
        """If everything is sent while something is computed."""
        return max(self.compute, self.gather + self.reduce) + self.waiting


WAYS = ("DDP", "HSDP", "FSDP2")  # every weight everywhere, sharded over the GPUs of a node, sharded over all
# Estimates of frozen layers: none, columns that all select alike, or 8-bit copies, whole on every GPU.
BACKWARDS = ("exact", "columns", "int8")


def step(setting: Setting, gpus: int, way: str, backward: str) -> Step:
    """A step on `gpus`; where it is estimated, weights are sharded by `celora.fsdp.shard`."""
    numbers = sum(rows * columns for rows, columns in setting.frozen)
    head, adapters = setting.vocabulary * setting.hidden, sum(rows * columns for rows, columns in setting.trained)
    cost = {"exact": 1.0, "columns": setting.keep_ratio, "int8": setting.eight_bit}[backward]
    products = (1 + cost) * numbers + 2 * head + 3 * adapters
    compute = 2 * setting.tokens * products / setting.flops
    waiting = compute * setting.jitter * math.sqrt(2 * math.log(gpus))  # the slowest of so many normal ones

    def time(collective: str, given: float, group: int, *, across: bool, calls: int = 1) -> float:
        if group == 1:
            return 0.0
        hops = 2 * math.ceil(math.log2(group)) if collective == "all_reduce" else group - 1  # a tree, a ring
        rate, hop = (setting.between, setting.hop_between) if across else (setting.inside, setting.hop_inside)
        return sent(collective, given, group) / rate + calls * hops * hop

    several = gpus > setting.node
    shards = {"DDP": 1, "HSDP": min(gpus, setting.node), "FSDP2": gpus}[way]
    within = several and shards > setting.node  # whether a shard's group spans nodes
    reduce = time("reduce_scatter", 4 * adapters, shards, across=within)
    reduce += time("all_reduce", 4 * adapters / shards, gpus // shards, across=several)
    if backward == "columns":
        scores = statistics(out_features for out_features, _ in setting.frozen)
        reduce += time("all_reduce", scores, gpus, across=several) / setting.refresh_every
    forward = held([*setting.frozen, (setting.vocabulary, setting.hidden)], shards, 2)
    calls = (
        setting.layers if backward == "exact" else len(setting.frozen)
    )  # one gathering for each block, or for each weight
    gather = time("all_gather", forward, shards, across=within, calls=calls)
    if backward != "int8":
        again = (
            held(setting.frozen, shards, 2)
            if backward == "exact"
            else kept(setting.frozen, setting.keep_ratio, shards, 2)
        )
        gather += time("all_gather", again, shards, across=within, calls=calls)
    return Step(1e3 * compute, 1e3 * gather, 1e3 * reduce, 1e3 * waiting)


GPUS = (1, 8, 64, 1000)


def table(setting: Setting) -> str:
    """The parts of a step, and its throughput for each GPU relative to one GPU alone that does the same."""
    lines = [
        "| GPUs | | compute, ms | gather, ms | reduce, ms | waiting, ms | step, ms, overlapped to serial | relative |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gpus in GPUS:
        for way in WAYS[:1] if gpus == 1 else WAYS if gpus > setting.node else (WAYS[0], WAYS[2]):
            for backward in BACKWARDS:
                s, alone = step(setting, gpus, way, backward), step(setting, 1, "DDP", backward)
                least, most = (100 * alone.serial / time for time in (s.serial, s.overlapped))
                lines.append(
                    f"| {gpus:,} | {way}, {backward} | {s.compute:.0f} | {s.gather:.0f} "
                    f"| {s.reduce:.1f} | {s.waiting:.1f} | {s.overlapped:.0f} to {s.serial:.0f} "
                    f"| {least:.0f} to {most:.0f} % |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Setting):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    print(table(Setting(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
