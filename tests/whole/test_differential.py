"""Whatever is trained, and however, `exact` is PEFT: losses and gradients of generated cases, and what is left behind.

200 cases by default, always the same. HYPOTHESIS_PROFILE=nightly trains 3,000 new ones, or DIFFERENTIAL_CASES of them.
A failing case is printed as a call that can be put into `FOUND`.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import warnings
from collections.abc import Sequence
from types import MethodType
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from peft import PeftModel
from torch import Tensor, nn

import celora
from celora.errors import CELoraError
from celora.modeling import fused, packing
from celora.modeling import model_graft as forward
from celora.modeling.attention import LENGTHS
from celora.modeling.fused import lora_linear
from celora.modeling.packing import pack
from celora.numerics.head import score_tokens
from differential import ROUNDING, Case, NotTrainable, Trace, build, call, inputs, same_masks, train
from drawn import cases, fits
from drawn_models import EXPERTS, causal_of, duplicate

HALF = ("bfloat16", "float16")
_DRAWS = range(4)  # seeds of `nudged`
FLOOR = 0.03  # rounding to half precision may add this share of a value


class Difference(AssertionError):
    """celora and PEFT do not agree."""


def check(case: Case) -> None:
    """Raise `Difference` if `exact` differs from PEFT in this case, `NotTrainable` if there is nothing to compare."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each training records its own warnings
        _check(case)


def _check(case: Case) -> None:
    try:
        model = build(case)
        plain = train(case, duplicate(model), attached=False)
    except Exception as error:
        raise NotTrainable(f"{type(error).__name__}: {error}") from error
    rough = case.dtype in HALF or case.autocast or "adapter_dtype" in dict(case.lora)
    truth = more_precise(case, model, torch.float32) if rough else None
    found = train(case, model, attached=True)
    compare_warnings(case, found, plain)
    try:
        if truth is not None:
            compare_rough(found, [plain], truth, floor=FLOOR)
        else:
            compare(found, plain)
    except Difference:
        # Some cases are that sensitive to rounding. Then celora must be as near as PEFT to a more precise training.
        if truth is None and case.dtype != "float32":
            raise
        floor, half_unit = (ROUNDING, 2**-24) if truth is None else (FLOOR, 2**-8)  # for float32; for bfloat16
        truth = more_precise(case, build(case), torch.float64) if truth is None else truth
        theirs = [plain, *(train(case, nudged(build(case), seed, half_unit), attached=False) for seed in _DRAWS)]
        ours = [found, *(train(case, nudged(build(case), seed, half_unit), attached=True) for seed in _DRAWS)]
        missed = [reason for trace in ours if (reason := _missed(trace, theirs, truth, floor))]
        if 2 * len(missed) > len(ours):  # a mistake shows in all draws, bad luck only in some
            raise missed[0] from None
    compare_what_is_left(case, found, plain)


def _missed(found: Trace, plain: Sequence[Trace], truth: Trace, floor: float) -> Difference | None:
    try:
        compare_rough(found, plain, truth, floor=floor)
    except Difference as difference:
        return difference
    return None


def more_precise(case: Case, model: PeftModel, dtype: torch.dtype) -> Trace:
    """PEFT's training of a copy of `model` in this dtype; `NotTrainable` if rounding decides which expert is asked.

    A router that is undecided within `FLOOR` may choose different experts in two dtypes, and both are right.
    """
    model = duplicate(model).to(dtype)
    if case.family not in EXPERTS:
        return train(case, model, attached=False, dtype=dtype)
    causal_of(model).set_experts_implementation("eager")  # other implementations do not multiply in float64
    margins: list[float] = []

    def note(_router: nn.Module, _args: Any, output: tuple[Tensor, ...]) -> None:
        scores = output[0].detach().sort(dim=-1).values
        margins.append(float((scores.diff(dim=-1).amin(dim=-1) / scores.abs().amax(dim=-1)).min()))

    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(note)
    trace = train(case, model, attached=False, dtype=dtype)
    if dtype == torch.float32 and min(margins, default=1.0) < 2 * FLOOR:
        raise NotTrainable("a router is undecided")
    return trace


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm())


def compare(found: Trace, plain: Trace) -> None:
    """Compare to float32 rounding: each value by itself, each gradient by its norm and the largest round's norm."""
    same_kind(found, plain)
    for name, value in plain.values.items():
        near(name, distance(found.values[name], value), ROUNDING * (float(value.double().norm()) + 1e-3), value)
    sizes = [math.hypot(*(float(g.double().norm()) for g in one.values() if g is not None)) for one in plain.gradients]
    size = max(sizes)  # in one round all terms may cancel, so that only rounding is left
    for i, expected in enumerate(plain.gradients):
        for name, g in expected.items():
            if g is not None:
                allowed = ROUNDING * (float(g.double().norm()) + 0.1 * size + 1e-9)
                near(f"round {i}: gradient of {name}", distance(found.gradients[i][name], g), allowed, g)


def nudged(model: PeftModel, seed: int, half_unit: float) -> PeftModel:
    """The model with each weight moved by at most half a unit in the last place. That can switch a unit near zero.

    So a single distance from the truth, PEFT's or celora's, is a matter of luck. Several draws show how large it can
    be.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.double() * (1 + half_unit * (2 * torch.rand(p.shape, generator=generator) - 1)))
    return model


def compare_rough(found: Trace, plain: Sequence[Trace], truth: Trace, *, factor: float = 3.0, floor: float) -> None:
    """No further from a more precise training than PEFT, up to a factor and a share of rounding.

    The weights are the same. Of several trainings by PEFT, the one that is furthest counts.
    """
    same_kind(found, plain[0])
    for name, value in truth.values.items():
        size = float(value.double().norm())
        if name.endswith("loss"):  # a small loss is a difference of logits, which are rounded
            size = max(1.0, size)
        allowed = factor * max(distance(trace.values[name], value) for trace in plain) + floor * size
        near(name, distance(found.values[name], value), allowed, value)
    for i, exact in enumerate(truth.gradients):
        known = {name: g for name, g in exact.items() if g is not None}
        own_errors, *their_errors = (
            {name: distance(trace.gradients[i][name], g) for name, g in known.items()} for trace in (found, *plain)
        )
        ours, theirs = math.hypot(*own_errors.values()), max(math.hypot(*errors.values()) for errors in their_errors)
        size = math.hypot(*(float(g.norm()) for g in known.values()))
        near(f"round {i}: gradient", ours, factor * theirs + floor * size, torch.tensor(size))
        for name, g in known.items():
            their = max(errors[name] for errors in their_errors)
            allowed = 2 * factor * their + 2 * floor * float(g.norm()) + floor * size
            near(f"round {i}: gradient of {name}", own_errors[name], allowed, g)


def near(name: str, error: float, allowed: float, expected: Tensor) -> None:
    """An error that is not a number is right only if the expected value is not a number either."""
    known = bool(expected.isfinite().all())
    if known and math.isnan(allowed):
        return  # PEFT's own value is not a number
    if (known and not error <= allowed) or (not known and math.isfinite(error)):
        size = float(expected.double().norm())
        raise Difference(f"{name}: off by {error:.3g} of {size:.3g}, allowed {allowed:.3g}")


def same_kind(found: Trace, plain: Trace) -> None:
    """The same results, with the same shapes and dtypes, and gradients for the same parameters."""
    for name, value in plain.values.items():
        other = found.values.get(name)
        if other is None or other.shape != value.shape:
            raise Difference(f"{name}: {None if other is None else tuple(other.shape)} for {tuple(value.shape)}")
    for i, expected in enumerate(plain.gradients):
        kinds = [
            {n: None if g is None else g.dtype for n, g in gradients.items()}
            for gradients in (found.gradients[i], expected)
        ]
        if kinds[0] != kinds[1]:
            names = [n for n in kinds[1] if kinds[0].get(n, "absent") != kinds[1][n]]
            raise Difference(
                f"round {i}: gradients {[(n, kinds[0].get(n, 'absent'), kinds[1][n]) for n in names[:3]]} "
                f"({len(names)} parameters)"
            )


def compare_warnings(case: Case, found: Trace, plain: Trace) -> None:
    """Only celora may give more warnings than PEFT, and each only once for each time that it is attached."""
    times = 1 + sum(what in ("attach", "reattach") for what in case.between)
    new = [text for text in found.warned if text not in plain.warned]
    for text in new:
        if not text.startswith("celora:"):
            raise Difference(f"a warning that PEFT does not give: {text}")
        if new.count(text) > times:
            raise Difference(f"said {new.count(text)} times: {text}")


def compare_what_is_left(case: Case, found: Trace, plain: Trace) -> None:
    """A detached model equals, bit for bit, a model that celora was never attached to."""
    celora.detach(found.model)
    for (name, a), (_, b) in zip(found.model.named_modules(), plain.model.named_modules(), strict=True):
        if outside(a) != outside(b):
            raise Difference(f"after detach, {name or 'the model'} has {outside(a)} for {outside(b)}")
    states = [trace.model.state_dict() for trace in (found, plain)]
    if states[0].keys() != states[1].keys():
        raise Difference(f"after detach, the state is of {sorted(states[0].keys() ^ states[1].keys())[:3]}")
    for name, value in states[1].items():
        if not torch.equal(states[0][name], value):
            raise Difference(f"after detach, {name} has changed")
    try:
        expected = one_more(case, plain.model)
    except Exception:
        return  # plain PEFT cannot do this: its loss refuses these labels, or torch kept a tensor of its graph
    if not all(torch.equal(a, b) for a, b in zip(one_more(case, found.model), expected, strict=True)):
        raise Difference("after detach, results differ")


def one_more(case: Case, model: PeftModel) -> list[Tensor]:
    """The results of one more forward and backward, with NaN and infinity replaced by numbers."""
    model.zero_grad()
    torch.manual_seed(0)
    with same_masks():
        output = call(case, model, inputs(case, model, 3))
        first = output[0] if isinstance(output, tuple) or output.get("loss") is None else output["loss"]
        first.float().sum().backward()
    return [t.nan_to_num() for t in (first.detach(), *(p.grad for p in model.parameters() if p.grad is not None))]


def outside(module: nn.Module) -> dict[str, Any]:
    """What other code can see of one module, apart from its parameters."""
    hooks = {
        name: [getattr(hook, "__qualname__", type(hook).__qualname__) for hook in value.values()]
        for name, value in module.__dict__.items()
        if "hooks" in name and isinstance(value, dict) and "_with_kwargs" not in name and "_always" not in name
    }
    config = getattr(module, "config", None)
    told = {} if config is None else {"config": config.to_dict(), "attention": config._attn_implementation}
    # Transformers 4 leaves each attention's own forward as an attribute, when it has recorded attentions.
    own = module.__dict__.get("forward") == MethodType(type(module).forward, module)
    attributes = sorted(module.__dict__.keys() - ({"forward"} if own else ()))
    kind = {"class": type(module).__qualname__, "training": module.training, "attributes": attributes}
    return kind | hooks | told


# All differences that were found, each in its simplest form.
FOUND = {
    "a copy made of a model whose first forward was interrupted": Case(
        acts=(("interrupt", 1, 0),), labels="none", between=("copy",)
    ),
    "a pruned base layer": Case(acts=(("prune base", 0, 4),)),
    "a base layer's forward replaced later": Case(acts=(("patch base", 1, 5),)),
    "a base layer's input changed by a hook": Case(acts=(("pre-hook base", 1, 3),)),
    "a base layer's backward hook": Case(acts=(("backward hook base", 0, 3),)),
    "a backward hook where no input needs a gradient": Case(acts=(("backward hook base", 1, 1),)),
    "positions of packed sequences beside a cache that is not used": Case(mask="packed"),
    "a cache that is asked for": Case(extra=(("use_cache", True),)),
    "a forward whose operators are counted, and its repetition's are not": Case(
        acts=(("checkpoint", 0, 0),), call="counted"
    ),
    "a hook of the model that changes the loss, in a call of the tuner": Case(
        acts=(("hook model", 1, 0),), call="tuner"
    ),
    "a checkpoint of the whole model": Case(call="checkpointed", mask="right"),
    "a checkpoint of a whole model with a loss of its own": Case(call="checkpointed", family="opt"),
    "two calls with the same labels, each a checkpoint": Case(call="checkpointed", backward="two calls"),
    "smoothed labels in evaluation mode": Case(acts=(("evaluation mode", 0, 0),), smoothing="celora"),
    "two-sided attention in one call": Case(extra=(("is_causal", False),), mask="right"),
    "two-sided attention in every layer": Case(acts=(("module is_causal", 0, 0),), mask="right"),
    "two-sided attention by configuration": Case(acts=(("config is_causal", 0, 0),), mask="right"),
    "a head's forward replaced later": Case(acts=(("patch head", 1, 0),)),
    "a unit that rounding switches on": Case(
        family="opt", attention="eager", dtype="bfloat16", seed=1, acts=(("patch head", 0, 0),), labels="last"
    ),
    "a gradient that half a unit in the last place of the weights changes more than celora does": Case(
        family="gpt2",
        seed=1,
        lora=(("lora_alpha", 32), ("r", 1)),
        acts=(("hook block", 0, 5), ("hook block", 0, 3)),
        width=6,
        mask="block",
        embeds="frozen",
        extra=(("token_type_ids", "given"),),
    ),
    "a gradient that rounding to bfloat16 may triple": Case(
        family="llava",
        dtype="bfloat16",
        seed=1,
        lora=(("r", 1),),
        acts=(("hook embedding", 0, 0), ("look at base", 0, 0)),
        rows=1,
        width=20,
        mask="packed",
        labels="some",
        accumulate=2,
    ),
    "a loss far smaller than the rounding of its logits": Case(
        family="gemma2",
        config=(("final_logit_softcapping", None), ("sliding_window", 100)),
        attention="eager",
        seed=1,
        lora=(("bias", "lora_only"), ("lora_alpha", 32), ("kept_dtype", False)),
        width=13,
        mask="empty",
        labels="last",
        autocast=True,
    ),
    "a gradient under autocast, whose rounding is bfloat16's": Case(
        family="llava",
        lora=(("bias", "lora_only"), ("r", 1)),
        acts=(("patch embedding", 0, 0), ("look at base", 0, 4), ("patch base", 0, 3)),
        width=20,
        labels="some",
        items="int",
        autocast=True,
    ),
    "a router's loss at its least, where all of a gradient cancels": Case(
        family="mixtral", acts=(("config experts", 0, 0),), rows=3, width=1
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name: str) -> None:
    check(FOUND[name])


@pytest.mark.skipif(not EXPERTS, reason="Transformers 4 has other routers")
def test_a_choice_of_experts_that_rounding_decides_is_no_case() -> None:
    config = (("hidden_act", "relu"), ("num_key_value_heads", 1))
    with pytest.raises(NotTrainable, match="undecided"):
        check(Case(family="mixtral", config=config, dtype="bfloat16", width=2))


def _adapter(x: Tensor, output: Tensor, weight: Any, bias: Any, adapter: Any, *rest: Any) -> Tensor:
    wrong = dataclasses.replace(adapter, scaling=adapter.scaling * 1.0002)
    return lora_linear(x, output, weight, bias, wrong, *rest)


def _head(*args: Any, **kwargs: Any) -> Any:
    scores = score_tokens(*args, **kwargs)
    return dataclasses.replace(scores, log_probs=scores.log_probs * 1.0002)


def _packed(*args: Any) -> Any:
    inputs = pack(*args)
    return inputs if inputs is None else inputs | {LENGTHS: (sum(inputs[LENGTHS]),)}


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        (fused, "lora_linear", _adapter),
        (forward, "score_tokens", _head),
        (packing, "pack", _packed),
        (importlib.import_module("celora.attaching"), "remove", lambda module: None),
    ],
    ids=["adapters", "head", "packing", "detach"],
)
def test_the_comparison_sees_mistakes(module: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake is put into each path of `exact`. Mistakes that have a size are two in ten thousand."""
    case = Case(rows=3, width=13, mask="right")
    check(case)
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(Difference):
        check(case)


def test_a_case_is_printed_as_the_call_that_makes_it() -> None:
    for case in FOUND.values():
        assert eval(repr(case), {"Case": Case}) == case


# The profile's own numbers are for the four tests of test_input.py, whose cases are faster.
CASES = {"ci": 200, "nightly": 3_000}[os.environ.get("HYPOTHESIS_PROFILE", "ci")]


@settings(max_examples=int(os.environ.get("DIFFERENTIAL_CASES", CASES)), suppress_health_check=list(HealthCheck))
@given(cases())
def test_exact_is_peft(case: Case) -> None:
    hypothesis.assume(fits(case))
    try:
        check(case)
    except NotTrainable:
        hypothesis.reject()
    except CELoraError as error:
        if not (case.smoothing == "celora" and "smooth" in str(error)):
            raise
