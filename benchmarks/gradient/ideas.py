"""Estimates that were tried and are not in celora, with the cosines that they keep: rows for docs/develop/log.

The setting is that of `fidelity.py` with T = 1024 tokens, all labelled. Each idea keeps as many tokens of the frozen
product as the estimate that it is compared with. So the cosine decides:

* One choice for a block. The tokens chosen for `down_proj` (for attention: `o_proj`) also serve the block's other
  layers, because the gradient of the residual stream arrives there. A variant lets the adapters skip tokens, too.
* A threshold from the layer's history: the norm that kept as many tokens on other batches, instead of a share of each
  batch.
* Layers exact in turns: a quarter of the blocks in each step; the others keep fewer tokens.

It measures cosines of single steps, and of the sum over four steps, where errors could cancel. Writes `ideas.jsonl`.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from torch import Tensor
from transformers.utils import logging

import celora
from benchmarks import rows
from benchmarks.gradient import fidelity
from celora.modeling.switch import Mode
from celora.numerics.estimators import Dense
from celora.numerics.select import energy_count
from celora.planning.fidelity import Fidelity
from celora.runtime.attachment import require

SHARE, ENERGY, STEPS, TURNS = 0.6, 0.99, 4, 4
Batch = dict[str, Tensor]
Choose = Callable[[str, Tensor], Tensor]  # (layer, grad_output of shape (T, out)) -> which tokens, bool of shape (T,)


class Chosen(Dense):
    """The product of chosen tokens only."""

    def __init__(self, out_features: int, in_features: int, choose: Callable[[Tensor], Tensor]) -> None:
        super().__init__(out_features, in_features)
        self.choose = choose

    def estimate(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        return torch.where(self.choose(grad_output)[:, None], grad_output @ weight, 0)


def top(share: float) -> Choose:
    """The share of the tokens with the largest norms."""

    def choose(name: str, grad: Tensor) -> Tensor:
        norms = grad.norm(dim=1)
        return norms >= norms.topk(max(1, round(share * len(norms)))).values[-1]

    return choose


def shared(share: float, leaders: dict[str, str]) -> Choose:
    """In a block, the layers use the choice of their leader. Leaders come first in backward."""
    chosen: dict[str, Tensor] = {}
    own = top(share)

    def choose(name: str, grad: Tensor) -> Tensor:
        block, kind = name.rsplit(".", 2)[0], name.rsplit(".", 1)[1]
        leader = leaders[kind]
        if leader == kind:
            chosen[f"{block}.{kind}"] = own(name, grad)
        return chosen[f"{block}.{leader}"]

    return choose


def energy(share: float, counts: dict[str, list[int]], norms: dict[str, list[Tensor]]) -> Choose:
    """The fewest tokens that carry the share of each batch's squared norm. Records how many, and all norms."""

    def choose(name: str, grad: Tensor) -> Tensor:
        squared = grad.square().sum(1)
        order, kept = squared.argsort(descending=True), int(energy_count(squared, share))
        counts.setdefault(name, []).append(kept)
        norms.setdefault(name, []).append(squared)
        return torch.zeros_like(squared, dtype=torch.bool).index_fill(0, order[:kept], True)

    return choose


def threshold(least: dict[str, Tensor], counts: dict[str, list[int]]) -> Choose:
    """The tokens whose squared norm reaches the layer's own threshold. Records how many."""

    def choose(name: str, grad: Tensor) -> Tensor:
        found = grad.square().sum(1) >= least[name]
        counts.setdefault(name, []).append(int(found.sum()))
        return found

    return choose


def in_turns(share: float) -> Choose:
    """All tokens in every fourth block, in the next block in the next step."""
    own, steps = top(share), Counter[str]()

    def choose(name: str, grad: Tensor) -> Tensor:
        block = next(int(part) for part in name.split(".") if part.isdigit())
        exact = block % TURNS == steps[name] % TURNS
        steps[name] += 1
        return torch.ones(len(grad), dtype=torch.bool) if exact else own(name, grad)

    return choose


ALONE = {kind: kind for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}
HALVES = (
    ALONE
    | dict.fromkeys(("q_proj", "k_proj", "v_proj"), "o_proj")
    | dict.fromkeys(("gate_proj", "up_proj"), "down_proj")
)
BLOCK = dict.fromkeys(ALONE, "down_proj")


def gradients(
    model: PeftModel, batches: list[Batch], choose: Choose | None, *, whole: bool = False
) -> list[list[Tensor]]:
    """The LoRA gradient of each batch. With `whole`, the adapters skip tokens that are not chosen, too."""
    found = []
    with ExitStack() as stack:
        for name, graft in require(model).grafts.items():
            layer = model.get_submodule(name)
            base = layer.get_base_layer()
            graft.mode = Mode.EXACT if choose is None or whole else Mode.ESTIMATE
            if choose is not None:
                choice = functools.partial(choose, name)
                graft.estimator = Chosen(base.out_features, base.in_features, choice)
                if whole:
                    stack.callback(layer.register_forward_hook(_mask_gradient(choice)).remove)
        for batch in batches:
            model.zero_grad()
            model(**batch).loss.backward()
            found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    return found


def _mask_gradient(choose: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def mask(grad: Tensor) -> Tensor:
        return torch.where(choose(grad.flatten(0, -2)).view(grad.shape[:-1])[..., None], grad, 0)

    def hook(layer: Any, inputs: Any, output: Tensor) -> None:
        output.register_hook(mask)

    return hook


def study(seed: int) -> list[dict[str, Any]]:
    fidelity.BATCH = 8
    batches = fidelity.text_batches(seed)
    model = fidelity.warmed_up(seed, batches[: fidelity.WARM_UP])
    # Nothing may change the forward: `whole` needs the adapter's output at the end of a layer's output.
    celora.attach(model, celora.CELoraConfig(estimator="tokens", keep_ratio=SHARE, rank=0, fused=False,
                                             padding_free=False, labelled_head=False, zero_tokens=False))  # fmt: skip
    before, used = (batches[fidelity.WARM_UP + i * STEPS :][:STEPS] for i in (0, 1))
    exact = gradients(model, used, None)
    found = []

    def judge(name: str, estimated: list[list[Tensor]], kept: float) -> None:
        alone = [Fidelity.of(list(zip(e, x, strict=True))) for e, x in zip(estimated, exact, strict=True)]
        sums = ([sum(parts) for parts in zip(*lists, strict=True)] for lists in (estimated, exact))
        together = Fidelity.of(list(zip(*sums, strict=True)))
        found.append({"idea": name, "seed": seed, "kept": round(kept, 4), "steps": STEPS,
                      "cosine": round(statistics.fmean(f.cosine for f in alone), 5),
                      "cosine_of_sum": round(together.cosine, 5)} | rows.conditions())  # fmt: skip
        Console().print({key: value for key, value in found[-1].items() if key not in rows.conditions()})

    for whole in (False, True):
        for name, leaders in (
            ("a choice for each layer", ALONE),
            ("for each half of a block", HALVES),
            ("for a block", BLOCK),
        ):
            judge(name + (", adapters skip too" if whole else ""),
                  gradients(model, used, shared(SHARE, leaders), whole=whole), SHARE)  # fmt: skip
    counts: dict[str, list[int]] = {}
    norms: dict[str, list[Tensor]] = {}
    gradients(model, before, energy(ENERGY, counts, norms))
    least = {name: torch.cat(seen).sort(descending=True).values[sum(counts[name]) - 1] for name, seen in norms.items()}
    counts.clear()
    tokens = sum(batch["input_ids"].numel() for batch in used) * len(least)
    estimated = gradients(model, used, energy(ENERGY, counts, {}))
    judge("a share of each batch's squared norm", estimated, sum(map(sum, counts.values())) / tokens)
    counts.clear()
    estimated = gradients(model, used, threshold(least, counts))
    judge("a threshold from earlier batches", estimated, sum(map(sum, counts.values())) / tokens)
    judge("blocks exact in turns", gradients(model, used, in_turns((TURNS * SHARE - 1) / (TURNS - 1))), SHARE)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    logging.disable_progress_bar()
    rows.write(Path(__file__).with_name("ideas.jsonl"), [row for seed in range(options.seeds) for row in study(seed)])


if __name__ == "__main__":
    main()
