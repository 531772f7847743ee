"""The gate of presets `auto` and `fast`: a few seconds of timing decide what is estimated, so that nothing gets slower.

Layers of one shape, dtype and device are timed together. The contenders take turns: products in 8 bits (preset `fast`:
in both directions, and with an exact forward), products of the same tokens in the gradient's own dtype, and PEFT's
products. The fastest wins. The vocabulary projection is timed in the same way. Times are stored in the user's cache.
On a GPU, preset `auto` estimates nothing: what estimates gain there was not measured.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from celora.kernels.backends import chosen
from celora.kernels.operations import linear
from celora.machine.cache import keep, recall
from celora.machine.cpu import features, limits
from celora.machine.device import measured_on, random_states, reads_freely
from celora.machine.packages import package_version
from celora.machine.processes import made_by_first
from celora.machine.timing import cannot_time, disturbed, ratios, time_over_float32
from celora.modeling.assign import rank_of
from celora.modeling.int8_linear import Int8Linear
from celora.modeling.language_model import at_hand
from celora.modeling.survey import AdaptedLayer, Survey
from celora.modeling.trial import trained_forward
from celora.numerics.estimators import Estimator, make_estimator
from celora.numerics.head import chunk_size, through_the_head
from celora.runtime.ladder import WORDS
from celora.settings.config import LAYER_FIELDS, CELoraConfig, LayerConfig
from celora.settings.names import HEAD
from celora.weights.read import read

EXACT = LayerConfig("dense")
MARGIN = 0.97  # of the exact time: an estimate must be faster than that, or the gain may be noise
TOKENS = 512  # products are timed with at most so many on a CPU; the fastest stays the fastest with more
_ELSEWHERE = 8192  # tokens of a batch on an accelerator, if nobody says how many
_FEWEST, _MOST_NUMBERS = 16, 2**31  # at least so many tokens; at most so many multiplications in a product
_FEWEST_ROWS = 2048  # of a weight that is too large to be timed whole
_REPEATS = 9
_LEAST_WORDS = 2048  # to draw: the targets of some 1,000 tokens, and as many that they are confused with


@dataclasses.dataclass(frozen=True)
class Gated:
    """What the gate decided, and the times that it decided by.

    Attributes:
        config: the configuration, with an override for each layer whose own setting is not the fastest here.
        timings: for each kind of layer that was timed, and for the head, in plain values: the layers, and the time of
            each setting over that of the exact products. `chosen` is the fastest.
    """

    config: CELoraConfig
    timings: tuple[dict[str, Any], ...] = ()


def gate(
    found: Survey,
    config: CELoraConfig,
    tokens: int | None = None,
    labelled: int | None = None,
    *,
    given: Collection[str] = (),
) -> Gated:
    """Find out which layers' own setting is the fastest on this machine. The others get an override.

    The vocabulary projection stays exact if drawing words is not faster, unless `head_forward` is in 8 bits or the user
    has given a share. If several processes train together, all use what the first one measures.

    Args:
        tokens: number of tokens in a batch; None for 512 on a CPU, and 8,192 elsewhere.
        labelled: how many of them have a label; None for all.
        given: fields that the user has set.
    """
    labelled = tokens if labelled is None else labelled
    with random_states({layer.device for layer in found.layers.values() if not cannot_time(layer.device)}):
        overrides, share, timings = made_by_first(lambda: _measured(found, config, tokens, labelled, given))
    settled = dataclasses.replace(config, overrides={**config.overrides, **overrides}, head_keep_ratio=share)
    return Gated(settled, tuple(timings))


@torch.inference_mode(False)  # what is timed is a training, wherever celora is attached
def _measured(
    found: Survey, config: CELoraConfig, tokens: int | None, labelled: int | None, given: Collection[str]
) -> tuple[dict[str, Mapping[str, Any]], float, list[dict[str, Any]]]:
    """The overrides of layers, the head's share of the words, and the times of both."""
    timings: list[dict[str, Any]] = []
    return _overrides(found, config, tokens, timings), _share(found, config, labelled, given, timings), timings


def _overrides(
    found: Survey, config: CELoraConfig, tokens: int | None, timings: list[dict[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    own = config.default
    kinds: dict[tuple[Any, ...], list[AdaptedLayer]] = {}
    for name, layer in found.layers.items():
        if layer.cannot_estimate or layer.dtype is None or cannot_time(layer.device):
            continue
        if dataclasses.replace(config.for_layer(name), saved_input=own.saved_input) == own:  # no product is another
            kind = layer.shape, layer.dtype, layer.device, layer.takes_forward, rank_of(layer, own), layer.quantised
            kinds.setdefault(kind, []).append(layer)
    overrides: dict[str, Mapping[str, Any]] = {}
    for (_, _, device, takes_forward, rank, quantised), layers in kinds.items():
        setting = dataclasses.replace(own, rank=rank, forward=own.forward if takes_forward else "exact")
        if _untried(config, device):
            best = EXACT
        else:
            best, timing = _fastest(setting, layers[0], tokens)
            parts = dict.fromkeys(layer.name.rpartition(".")[2] for layer in layers)
            named = ", ".join(parts) + (f" ({quantised})" if quantised else "")
            timings.append({"layers": named, "count": len(layers), "shape": [*layers[0].shape]} | timing)
        changes = {name: getattr(best, name) for name in LAYER_FIELDS if getattr(best, name) != getattr(own, name)}
        changes.pop("rank", None)
        if best == EXACT:  # it uses no other field
            changes = {"estimator": EXACT.estimator}
        overrides |= {f"={layer.name}": changes for layer in layers if changes}
    return overrides


def _fastest(own: LayerConfig, layer: AdaptedLayer, tokens: int | None) -> tuple[LayerConfig, dict[str, Any]]:
    """The fastest setting for layers of this one's kind, `EXACT` if none is clearly faster; and the times."""
    shape, dtype, device = layer.shape, layer.dtype, layer.device
    assert dtype is not None
    backward = dataclasses.replace(own, forward="exact")
    different = dict.fromkeys((own, backward, dataclasses.replace(backward, precision="native")))
    settings = [setting for setting in different if make_candidate(setting, shape, device).product.pays(*shape, device)]
    dtype = dtype if dtype.is_floating_point else torch.bfloat16  # the dtype of a quantised layer's products
    base = layer.base if layer.multiplies_own_bytes and not isinstance(layer.base, Int8Linear) else None
    tokens, rows = _timed(tokens, *shape, device, whole=base is not None)
    shape, trains_in = (rows, shape[1]), dtype if base is not None else _trains_in(dtype, device)
    key = {"layer": [dataclasses.asdict(setting) for setting in settings], "shape": shape, "tokens": tokens}
    if base is not None:  # its package computes the exact forward
        key |= {"base": layer.quantised} | {name: package_version(name) for name in ("bitsandbytes", "torchao")}
    if trains_in != dtype:
        key |= {"trains_in": str(trains_in)}
    over = _kept(
        key, 1 + len(settings), dtype, device,
        lambda: _over_exact(settings, shape, tokens, dtype, device, base, trains_in),
    )  # fmt: skip
    best, ratio = min(zip((EXACT, *settings), over, strict=True), key=lambda pair: pair[1])
    best = best if ratio < MARGIN else EXACT
    named = {_name(setting): ratio for setting, ratio in zip(settings, over[1:], strict=True)}
    return best, {"dtype": str(dtype), "tokens": tokens, "over_exact": named, "chosen": _name(best)}


def make_candidate(setting: LayerConfig, shape: tuple[int, int], device: torch.device) -> Estimator:
    """The estimator of this setting for a layer of this shape (out_features, in_features) on this device."""
    estimator = make_estimator(setting.estimator, *shape, vars(setting))
    estimator.device = device
    return estimator


def _name(setting: LayerConfig) -> str:
    if setting.estimator == EXACT.estimator:
        return "exact"
    both = ", forward too" if setting.forward != "exact" else ""
    return f"{setting.estimator} x {setting.precision}{both}"


def _over_exact(
    settings: list[LayerConfig],
    shape: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    base: nn.Module | None,
    trains_in: torch.dtype,
) -> list[float]:
    """The time of the exact products, then of the products of each setting, over that of the exact ones.

    Args:
        base: the layer to time if 8-bit products multiply with its own bytes, and not with a copy for the fastest
            kernel; else None, for a random weight.
        trains_in: the dtype of inputs, gradients and exact products.
    """
    out_features, in_features = shape
    if base is None:
        w = torch.randn(out_features, in_features, dtype=dtype, device=device) / in_features**0.5
    else:
        w = read(base, dtype)
    x = torch.randn(tokens, in_features, dtype=trains_in, device=device)
    # Real gradients have uneven tokens. With log-normal norms, about 92 % of the tokens carry 0.9997 of the energy.
    g = torch.randn(tokens, out_features, dtype=trains_in, device=device)
    g *= torch.randn(tokens, 1, dtype=trains_in, device=device).exp()
    w_exact = w if trains_in == dtype else w.to(trains_in)
    forward = any(setting.forward != "exact" for setting in settings)
    exact = (lambda: linear(x, w_exact) if base is None else trained_forward(base, x)) if forward else None
    named = {"0": _step(EXACT, shape, w_exact, x, g, exact)}
    named |= {str(i): _step(setting, shape, w, x, g, exact) for i, setting in enumerate(settings, 1)}
    return list(ratios(named, repeats=_REPEATS, device=device).values())


def _trains_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that products of a weight in `dtype` are timed with.

    On an accelerator, a model in float32 usually trains under autocast, which multiplies in bfloat16. Nobody knows
    before it trains, so there the faster of both counts.
    """
    shortened = dtype == torch.float32 and not reads_freely(device) and time_over_float32(torch.bfloat16, device) < 1
    return torch.bfloat16 if shortened else dtype


def _step(
    setting: LayerConfig, shape: tuple[int, int], w: Tensor, x: Tensor, g: Tensor, exact: Callable[[], Tensor] | None
) -> Callable[[], object]:
    """A function that computes the products of one layer's backward, and of its forward if settings differ in it.

    `exact` computes the layer's own forward; it is None if no setting has another.
    """
    estimator = make_candidate(setting, shape, w.device)
    estimator.observe(g, w, x)
    estimator.select()
    product: Any = estimator.product

    def step() -> object:
        if exact is None:
            return estimator.estimate(g, w)
        y = exact() if setting.forward == "exact" else product.forward(x, w, None)
        return y, estimator.estimate(g, w)

    return step


def _share(
    found: Survey, config: CELoraConfig, labelled: int | None, given: Collection[str], timings: list[dict[str, Any]]
) -> float:
    """The share of the words for the gradient of the logits: the configuration's, or 1 if 1 is as fast.

    A share that the user has given stays. So a training that is resumed on another machine has the same one. A rule's
    share is larger for small vocabularies: a draw of fewer words than there are targets is mostly noise.
    """
    share, model = config.head_keep_ratio, found.language_model
    if share == 1 or "head_keep_ratio" in given or model is None or not at_hand(model.head):
        return share
    weight = model.head.weight.detach()
    share = next((rung for rung in WORDS if rung >= max(share, _LEAST_WORDS / len(weight))), 1.0)
    if share == 1 or config.head_forward != "exact":
        return share
    if isinstance(weight, DTensor) or not weight.is_floating_point() or cannot_time(weight.device):
        return share
    if _untried(config, weight.device):
        return 1.0
    words, hidden = weight.shape
    tokens, rows = _timed(labelled, words, hidden, weight.device)
    dtype = _trains_in(weight.dtype, weight.device)
    key = {"head": share, "shape": (rows, hidden), "tokens": tokens}

    def measure() -> list[float]:
        calls = shares_of(weight[:rows].to(dtype), tokens, (1.0, share))
        return list(ratios(calls, repeats=_REPEATS, device=weight.device).values())

    ratio, drawn = _kept(key, 2, dtype, weight.device, measure)[1], f"{share:g} of the words"
    pays = ratio < MARGIN
    facts = {"layers": HEAD, "count": 1, "shape": [*weight.shape], "dtype": str(weight.dtype), "tokens": tokens}
    timings.append(facts | {"over_exact": {drawn: ratio}, "chosen": drawn if pays else "exact"})
    return share if pays else 1.0


def shares_of(weight: Tensor, tokens: int, shares: Sequence[float]) -> dict[str, Callable[[], object]]:
    """Functions that compute the gradient of a chunk of so many tokens' logits, by share of the words."""
    size = chunk_size(tokens, len(weight))
    grad = torch.randn(size, len(weight), device=weight.device).to(weight.dtype)
    out, targets = grad.new_empty(size, weight.shape[1]), torch.zeros(size, dtype=torch.long, device=weight.device)
    call = functools.partial(through_the_head, grad, weight, targets, out=out, seed=0)
    return {str(share): functools.partial(call, share) for share in shares}


def _untried(config: CELoraConfig, device: torch.device) -> bool:
    """Whether preset auto has to be exact on this device; `fast` is what a user asks for by name."""
    return config.forward == "exact" and device.type == "cuda"


def _timed(
    tokens: int | None, out_features: int, in_features: int, device: torch.device, *, whole: bool = False
) -> tuple[int, int]:
    """How many tokens to time, and with how many rows of a weight `(out, in)`; `whole`: with all of them.

    The tokens are a power of two, so that runs share measurements. On an accelerator they are as many as a batch has:
    with few, the time would be that of starting a kernel. On a CPU a large weight has fewer rows, and no fewer tokens:
    with few, the time would be that of reading the weight.
    """
    accelerated = not reads_freely(device)
    tokens = (_ELSEWHERE if accelerated else TOKENS) if tokens is None else tokens
    most = max(_FEWEST, tokens if accelerated else min(tokens, TOKENS))
    if whole and not accelerated:
        most = max(_FEWEST, min(most, _MOST_NUMBERS // max(1, out_features * in_features)))
    tokens = 1 << (most.bit_length() - 1)
    if whole or accelerated:
        return tokens, out_features
    return tokens, min(out_features, max(_FEWEST_ROWS, _MOST_NUMBERS // max(1, tokens * in_features)))


def _kept(
    key: dict[str, Any], count: int, dtype: torch.dtype, device: torch.device, measure: Callable[[], list[float]]
) -> list[float]:
    """The `count` ratios of this in the user's cache. If there are none, `measure` them now.

    They are stored, unless other programs disturbed them: later runs would repeat what chance has chosen.
    """
    machine: dict[str, Any] = {"device": measured_on(device), "threads": torch.get_num_threads()}
    machine |= {"by": chosen(dtype, device), "limits": limits()} | ({"has": features()} if device.type == "cpu" else {})
    versions = {name: package_version(name) for name in ("celora", "torch")}
    key = key | {
        "over": "exact",
        "shape": list(key["shape"]),
        "dtype": str(dtype),
        "machine": machine,
        "versions": versions,
    }
    times = recall(key)
    if isinstance(times, list) and len(times) == count and all(isinstance(time, float) for time in times):
        return times
    alone = not disturbed(device)
    times = measure()
    if alone:
        keep(key, times)
    return times
