"""The passes between products against Transformers' own, for every decoder that is packed, and what is left alone."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, PeftModel, get_peft_model
from test_packing import PACKED, model_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

import celora
from celora import CELoraConfig, CELoraError
from celora.kernels.c import library as kernels
from celora.machine.memory import saved_for_backward
from celora.modeling.passes import angles as angles_module
from celora.modeling.passes import gate as gate_module
from celora.modeling.passes import known as passes
from celora.modeling.passes import norm as norm_module
from celora.modeling.passes import rotation as rotation_module
from celora.modeling.passes.own_forward import OwnForward
from celora.modeling.switch import Switch
from celora.numerics import passes as passes_module
from patching import patch_all
from small import make_model
from tolerances import no_further
from without import without

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C compiler")
DTYPES = [torch.float32, torch.bfloat16]
FUSED = CELoraConfig(estimator="dense", fused=True)
NORMS = {LlamaRMSNorm: (0.0, True), GemmaRMSNorm: (1.0, False), Olmo2RMSNorm: (0.0, False)}


def results(function: Callable[..., Tensor], *of: Tensor) -> list[Tensor]:
    """What the function makes of these, and the gradient of each for the same random one of the result."""
    of = tuple(t.detach().requires_grad_() for t in of)
    y = function(*of)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, of, grad)]


def check(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor]) -> None:
    """That ours are no further from the result in float64 than theirs, but for chance."""
    for our, their, true in zip(ours, theirs, exact, strict=True):
        assert our.dtype == their.dtype
        assert our.shape == their.shape
        error, allowed = ((of.double() - true).norm() for of in (our, their))
        # In bfloat16 all of it is the result's own rounding, which is the same on every CPU; in float32 half of it and
        # more is the sums', whose order is the CPU's own.
        assert error <= (1.3 if our.dtype == torch.bfloat16 else 2.0) * allowed + 1e-9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 7, 33), (3, 5, 2, 16)])
def test_norms(shape: tuple[int, ...], kind: Any, dtype: torch.dtype) -> None:
    norm = kind(shape[-1]).to(dtype)
    nn.init.normal_(norm.weight)
    norm.weight.requires_grad_(False)
    offset, rounds = NORMS[kind]
    x = (3 * torch.randn(shape)).to(dtype)
    eps = norm_module.epsilon(norm)
    ours = results(lambda x: passes_module.rms_norm(x, norm.weight, eps, offset=offset, rounds=rounds), x)
    true = results(lambda x: F.rms_norm(x, x.shape[-1:], offset + norm.weight.double(), eps), x.double())
    check(ours, results(norm, x), true)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 7, 33), (300, 64)])
def test_gates(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = (30 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)

    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    ours = results(passes_module.gated, gate, up)
    check(ours, results(plain, gate, up), results(plain, gate.double(), up.double()))


@pytest.mark.parametrize("x", [float("nan"), float("inf"), -float("inf"), -100.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_at_the_ends(dtype: torch.dtype, x: float) -> None:
    gate, up = torch.full((2, 20), x, dtype=dtype), torch.ones(2, 20, dtype=dtype)
    ours = results(passes_module.gated, gate, up)
    theirs = results(lambda gate, up: F.silu(gate) * up, gate, up)
    for our, their in zip(ours, theirs, strict=True):
        if x != float("inf"):  # of which torch has no gradient: 0 times infinity
            torch.testing.assert_close(our, their, equal_nan=True, rtol=1e-2, atol=1e-30)
    norm = passes_module.rms_norm(gate, up[0], 1e-6)
    assert bool(norm.isfinite().all()) is (abs(x) == 100)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "batch", "angles"), [(4, 1, 1), (3, 2, 2), (1, 2, 1)])
def test_rotations(heads: int, batch: int, angles: int, dtype: torch.dtype) -> None:
    q = torch.randn(batch, 9, heads, 16).to(dtype).transpose(1, 2)
    k = torch.randn(batch, 1, 9, 16).to(dtype)
    cosine, sine = torch.randn(2, angles, 9, 16).to(dtype)

    def plain(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat(apply_rotary_pos_emb(q, k, cosine.to(q.dtype), sine.to(q.dtype)), 1)

    def ours(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat(apply_rotary_pos_emb(q, k, *angles_module.make_angles(cosine, sine)), 1)

    found = results(ours, q, k)
    check(found, results(plain, q, k), results(plain, q.double(), k.double()))
    # Each result is a sum of two products, rounded three times at most here and there; in bfloat16 always alike.
    largest = 2 * max(q.abs().max(), k.abs().max()) * max(cosine.abs().max(), sine.abs().max())
    allowed = 3 * torch.finfo(dtype).eps * float(largest) if dtype == torch.float32 else 0
    torch.testing.assert_close(found[0], plain(q, k), rtol=0, atol=allowed)
    whole = results(lambda q: ours(q, k)[:, :heads], q)
    assert whole[1].shape == q.shape


def test_contiguity_and_broadcasting_are_not_taken_for_granted() -> None:
    x, weight = torch.randn(9, 16).t(), torch.randn(9)
    expanded = torch.ones(()).expand(16, 9)
    for ours, plain in (
        (lambda x: passes_module.rms_norm(x, weight, 1e-6), lambda x: F.rms_norm(x, (9,), weight, 1e-6)),
        (lambda x: passes_module.gated(x, x + 1), lambda x: F.silu(x) * (x + 1)),
    ):
        found, expected = (of(x.requires_grad_()) for of in (ours, plain))
        torch.testing.assert_close(found, expected)
        gradient, true = (torch.autograd.grad(of, x, expanded)[0] for of in (found, expected))
        torch.testing.assert_close(gradient, true, rtol=1e-4, atol=1e-5)
    # One token for each of several sequences: a tensor may count as contiguous whatever its strides.
    q, angles = torch.randn(2, 3, 1, 8), torch.randn(2, 2, 1, 8)
    found = apply_rotary_pos_emb(q, q, *angles_module.make_angles(*angles))[0]
    torch.testing.assert_close(found, apply_rotary_pos_emb(q, q, *angles)[0])


ODD: dict[str, tuple[Tensor, Tensor, Tensor, int]] = {
    "another dtype": (torch.ones(1, 3, 5, 8), *torch.rand(2, 1, 5, 8).double(), 1),
    "sine of another dtype": (torch.ones(1, 3, 5, 8), torch.rand(1, 5, 8), torch.rand(1, 5, 8).bfloat16(), 1),
    "heads elsewhere": (torch.ones(1, 5, 3, 8), *torch.rand(2, 1, 5, 8), 2),
    "one angle for all": (torch.ones(3, 2, 5, 8), *torch.rand(2, 3, 1, 8), 1),
    "one sine for two cosines": (torch.ones(2, 3, 5, 8), torch.rand(2, 5, 8), torch.rand(1, 5, 8), 1),
    "a batch of angles": (torch.ones(1, 2, 5, 8), *torch.rand(2, 3, 5, 8), 1),
    "no batch": (torch.ones(2, 5, 8), *torch.rand(2, 5, 8), 0),
}


@pytest.mark.parametrize("what", ODD)
def test_angles_that_do_not_fit_are_multiplied_as_they_are(what: str) -> None:
    q, cosine, sine, dim = ODD[what]
    expected = apply_rotary_pos_emb(q, q, cosine, sine, dim)[0]
    angles = angles_module.make_angles(cosine, sine)
    found = apply_rotary_pos_emb(q, q, *angles, dim)[0]
    assert angles[0].angles.taken == 0
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


def test_angles_for_fewer_tokens_are_an_error() -> None:
    with pytest.raises(RuntimeError):
        apply_rotary_pos_emb(
            torch.ones(1, 3, 9, 8), torch.ones(1, 3, 9, 8), *angles_module.make_angles(*torch.rand(2, 1, 5, 8))
        )


def test_what_was_not_foreseen_gets_the_tensor() -> None:
    both = torch.randn(2, 1, 5, 8)
    cosine, sine = angles_module.make_angles(*both)
    q = torch.randn(1, 3, 5, 8)
    for found, expected in (
        (cosine.unsqueeze(1).unsqueeze(1), both[0][:, None, None]), (q * cosine, q * both[0]),
        (q + sine.unsqueeze(1), q + both[1][:, None]), (sine[0], both[1][0]), (cosine.double(), both[0].double()),
        (cosine * 2, both[0] * 2), (cosine + q, both[0] + q), (cosine * q, both[0] * q), (cosine.sum(), both[0].sum()),
        (F.dropout(cosine, 0.0), both[0]), (torch.cat([cosine, sine]), both.flatten(0, 1)),
        ((q * cosine.unsqueeze(1)) + q, q * both[0][:, None] + q),
        ((q * sine.unsqueeze(1)) + (q * cosine.unsqueeze(1)), q * both.sum(0)[:, None]),
        ((q * cosine.unsqueeze(1)).cos(), (q * both[0][:, None]).cos()),
    ):  # fmt: skip
        torch.testing.assert_close(found if isinstance(found, Tensor) else found.tensor(), expected)


def test_results_may_be_changed_in_place() -> None:
    x = torch.randn(1, 3, 5, 8).requires_grad_()
    angles = torch.rand(2, 1, 5, 8)
    for y in (
        passes_module.rms_norm(x, torch.ones(8), 1e-6),
        passes_module.gated(x, x),
        passes_module.rotated(x, *angles),
    ):
        y.mul_(2).sum().backward()


# What each decoder has of each kind in two layers. Gemma's gates are GELUs, Cohere's norms have a mean and its
# rotations other pairs; Phi-3's gate and up are one projection.
EVERY = {"RMS norms": 5, "gates": 2, "rotations": 2}
FOUND: dict[str, dict[str, int]] = {
    "gemma": {"RMS norms": 5, "rotations": 2},
    "gemma3_text": {"RMS norms": 13, "rotations": 2},
    "cohere": {"gates": 2},
    "olmo2": EVERY | {"RMS norms": 9},
    "qwen3": EVERY | {"RMS norms": 9},
    "phi3": {"RMS norms": 5, "rotations": 2},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", PACKED)
def test_every_decoder(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found is taken, recognised, and in the forward of every layer."""
    model = model_of(kind).to(dtype)
    expected = FOUND.get(kind, EVERY)
    assert Counter(of.name for of in passes.known(model).values()) == expected
    calls: Counter[str] = Counter()
    for name, function in {"RMS norms": "rms_norm", "gates": "gated", "rotations": "rotated"}.items():
        before = getattr(passes_module, function)

        def counted(*args: Any, name: str = name, before: Any = before, **kwargs: Any) -> Any:
            calls[name] += 1
            return before(*args, **kwargs)

        patch_all(monkeypatch, f"celora.numerics.passes:{function}", counted)
    with torch.no_grad():  # a norm whose weights are all 1, or 0, could be any of them
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    batch = {"input_ids": torch.randint(3, 64, (2, 9))}
    plain, truth = model(**batch).logits, copy.deepcopy(model).double()(**batch).logits
    report = celora.attach(model, FUSED)
    said = ", ".join(f"{count} {name}" for name, count in expected.items())
    assert any(all(part in note for part in said.split(", ")) for note in report.notes)
    model(**batch)  # norms are tried, several times perhaps, before they are used
    calls.clear()
    assert no_further(model(**batch).logits, plain, truth)
    turned = {"rotations": 2 * expected["rotations"]} if "rotations" in expected else {}  # queries and keys
    if kind == "olmo2" and dtype == torch.bfloat16:  # whose angles are float32 at all times
        turned["rotations"] = 0
    assert +calls == +Counter(expected | turned)


def test_less_is_saved_for_backward() -> None:
    model, batch = make_model(dtype=torch.bfloat16).train(), {"input_ids": torch.randint(3, 61, (4, 32))}
    celora.attach(model, FUSED)
    sizes = []
    for on in (False, True):
        with pytest.MonkeyPatch.context() as patch, saved_for_backward(model) as saved:
            if not on:
                without(patch, "c")
            model(**batch)
        sizes.append(saved.nbytes)
    tokens = 4 * 32
    # Float32 copies for x itself in four norms, as the first one's input needs no gradient, and each gate's own result.
    assert sizes[0] - sizes[1] == tokens * (4 * (4 - 2) * 48 + 2 * 2 * 80)


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    model.zero_grad()
    model(**batch).logits.float().square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


OTHERS: dict[str, Callable[[PeftModel], object]] = {
    "evaluation": lambda model: model.eval(),
    "float64": lambda model: model.double(),
    "trained": lambda model: [p.requires_grad_() for n, p in model.named_parameters() if "norm" in n],
    "another dtype": lambda model: [
        m.bfloat16() for m, kind in passes.known(model).items() if kind is norm_module.Norm
    ],
    "a hook": lambda model: [m.register_forward_hook(_look) for m in looked_at(model)],
    "a hook with kwargs": lambda model: [m.register_forward_hook(_look, with_kwargs=True) for m in looked_at(model)],
    "a pre-hook": lambda model: [m.register_forward_pre_hook(_look) for m in looked_at(model)],
    "a pre-hook with kwargs": lambda model: [
        m.register_forward_pre_hook(_look, with_kwargs=True) for m in looked_at(model)
    ],
    "a backward hook": lambda model: [
        model.enable_input_require_grads(),
        *(m.register_full_backward_hook(_look) for m in looked_at(model) if "Attention" not in type(m).__name__),
    ],
    "a forward": lambda model: [setattr(m, "forward", m.forward) for m in looked_at(model)],
    "a block's forward": lambda model: [setattr(m, "forward", m.forward) for m in passes.known(model)],
    "no kernels": lambda model: None,
}


def looked_at(model: PeftModel) -> list[nn.Module]:
    """The modules that a pass computes, or computes the work of: it calls all of a block but its activation."""
    found = passes.known(model).items()
    return [module.act_fn if kind is gate_module.Gate else module for module, kind in found]


def _look(*_: object) -> None:
    pass


EVERYTHING = ("rms_norm", "gated", "rotated")
LEFT = dict.fromkeys(("trained", "another dtype"), ("rms_norm",)) | {
    what: ("gated",) for what in OTHERS if "hook" in what
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_left_to_the_module(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the result of plain PEFT."""
    model, plain = (make_model().train() for _ in range(2))
    for each in (model, plain):
        OTHERS[what](each)
    celora.attach(model, FUSED)
    if what == "no kernels":
        without(monkeypatch, "c")
    seen: Counter[str] = Counter()
    for name in EVERYTHING:
        function = getattr(passes_module, name)

        def counted(*args: Any, name: str = name, function: Any = function, **kwargs: Any) -> Any:
            seen[name] += 1
            return function(*args, **kwargs)

        patch_all(monkeypatch, f"celora.numerics.passes:{name}", counted)
    batch = {"input_ids": torch.randint(3, 61, (2, 9))}
    found, expected = gradients(model, batch), gradients(plain, batch)
    assert set(seen) == set(EVERYTHING) - set(LEFT.get(what, EVERYTHING))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_hooks_of_others_see_what_they_saw() -> None:
    """A norm's, a block's and an attention's: what goes in, angles and all, what comes out, and the gradient."""
    model, plain = (make_model().train() for _ in range(2))
    celora.attach(model, FUSED)
    seen: dict[int, list[Tensor]] = {}
    for number, each in enumerate((model, plain)):
        each.enable_input_require_grads()
        tensors: list[Tensor] = seen.setdefault(number, [])

        def look(module: nn.Module, *values: Any, tensors: list[Tensor] = tensors) -> None:
            tensors.extend(value.detach() for value in tree_leaves(values) if isinstance(value, Tensor))

        layer = each.base_model.model.model.layers[1]
        for module in (layer.input_layernorm, layer.mlp, layer.self_attn):
            module.register_forward_pre_hook(look, with_kwargs=True)
            module.register_forward_hook(look, with_kwargs=True)
            if module is not layer.self_attn:  # whose arguments have names, of which such hooks know nothing
                module.register_full_backward_hook(look)
        gradients(each, {"input_ids": torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(3))})
    assert len(seen[0]) == len(seen[1]) == 19
    for found, expected in zip(seen[0], seen[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NORMS)
def test_norms_are_recognised(kind: Any, dtype: torch.dtype) -> None:
    norm = kind(48).to(dtype)
    nn.init.normal_(norm.weight)
    found = norm_module.recognise(norm)
    assert found is not None
    assert found.offset == NORMS[kind][0]
    assert found.rounds == NORMS[kind][1] or dtype == torch.float32  # where nothing is rounded


class WeightlessRMSNorm(nn.Module):
    """As NanoChat's."""

    eps = 1e-6


class BiasedRMSNorm(LlamaRMSNorm):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.bias = nn.Parameter(torch.zeros(size))


def test_norms_without_a_weight_or_with_a_bias_are_not_known() -> None:
    assert not passes.known(nn.Sequential(WeightlessRMSNorm(), BiasedRMSNorm(8)))


def test_only_what_is_on_cpu_is_known() -> None:
    assert passes.known(make_model())
    assert not passes.known(make_model().to("meta"))


def test_a_norm_is_tried_in_each_dtype() -> None:
    norm = Olmo2RMSNorm(32).requires_grad_(False).train()
    nn.init.normal_(norm.weight)
    norm_module.Norm(Switch()).under(norm)
    for dtype in DTYPES:  # in the first there is nothing to tell it from Llama's by
        x = torch.randn(200, 32).to(dtype)
        assert (norm.to(dtype)(x) == norm.eval()(x)).float().mean() > (0.99 if dtype == torch.bfloat16 else 0.3)
        norm.train()


def test_padding_of_zeros_tells_nothing_wrong() -> None:
    model = model_of("gemma")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_()
        model.get_input_embeddings().weight[0] = 0
    batch = {"input_ids": torch.randint(3, 64, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    batch["input_ids"][:, :6] = 0
    batch["attention_mask"][:, :6] = 0
    expected = gradients(model, batch)
    celora.attach(model, FUSED)
    torch.testing.assert_close(gradients(model, batch), expected, rtol=1e-3, atol=1e-5)


def test_attentions_that_look_at_their_angles() -> None:
    """DeepSeek's, which reads their shape: it has two ways to turn, and takes the other one."""
    config = AutoConfig.for_model(
        "deepseek_v3", hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        vocab_size=64, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=2,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lora = LoraConfig(target_modules=["q_b_proj", "o_proj"], r=4, init_lora_weights=False)
    model, batch = get_peft_model(base, lora).train(), {"input_ids": torch.randint(3, 64, (2, 9))}
    expected = gradients(model, batch)
    celora.attach(model, FUSED)
    assert rotation_module.Rotation not in passes.known(model).values()
    torch.testing.assert_close(gradients(model, batch), expected, rtol=1e-3, atol=1e-6)


def test_what_is_never_turned_in_one_pass_is_not_known() -> None:
    """GLM repeats each angle for two neighbours."""
    config = AutoConfig.for_model(
        "glm", hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert rotation_module.Rotation not in passes.known(model).values()


def test_recorded_attentions_do_not_end_the_rotations(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model().train(), {"input_ids": torch.randint(3, 61, (2, 9))}
    model.base_model.model.set_attn_implementation("eager")
    celora.attach(model, FUSED)
    assert model(**batch, output_attentions=True).attentions
    turned: list[int] = []
    rotated = passes_module.rotated
    patch_all(monkeypatch, "celora.numerics.passes:rotated", lambda *of: turned.append(1) or rotated(*of))
    model(**batch)
    assert len(turned) == 4


@pytest.mark.parametrize("how", ["autocast", "checkpointing", "reentrant"])
def test_ways_to_train(how: str) -> None:
    model, batch = make_model().train(), {"input_ids": torch.randint(3, 61, (2, 9))}
    if how != "autocast":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    truth, found = gradients(copy.deepcopy(model).double(), batch), []
    for _ in range(2):
        with torch.autocast("cpu", enabled=how == "autocast"):
            found.append(gradients(model, batch))
        celora.attach(model, FUSED)
    if how == "autocast":  # whose results are float32, and not as exact
        assert (found[1] - truth).norm() <= 2 * (found[0] - truth).norm()
    else:
        assert no_further(found[1], found[0], truth)


def test_an_activation_of_another_kind_is_not_known() -> None:
    class Louder(nn.SiLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = make_model()
    layers = model.base_model.model.model.layers
    layers[0].mlp.act_fn = Louder()
    assert [m for m, kind in passes.known(model).items() if kind is gate_module.Gate] == [layers[1].mlp]


def test_unknown_formulas_are_left_alone() -> None:
    class OtherRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) + 0.5

    class OtherMLP(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x) * self.up_proj(x)))

    model = make_model().train()
    layer = model.base_model.model.model.layers[0]
    config = model.base_model.model.config
    layer.input_layernorm = OtherRMSNorm(48).requires_grad_(False)
    plain_mlp, layer.mlp = layer.mlp, OtherMLP(config)
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(layer.mlp, name, getattr(plain_mlp, name))
    assert layer.mlp not in passes.known(model)
    batch = {"input_ids": torch.randint(3, 61, (2, 9))}
    expected = gradients(model, batch)
    celora.attach(model, FUSED)
    torch.testing.assert_close(gradients(model, batch), expected, rtol=1e-4, atol=1e-7)
    assert layer.input_layernorm.forward.tried == {torch.float32: None}


def test_a_copy_of_a_part_and_a_detached_model_are_plain() -> None:
    model = make_model().train()
    untouched = {name: sorted(vars(module)) for name, module in model.named_modules()}
    norm = model.base_model.model.model.norm
    celora.attach(model, FUSED)
    assert norm.forward.switch.on
    assert not copy.deepcopy(norm).forward.switch.on
    assert copy.deepcopy(model).base_model.model.model.norm.forward.switch.on
    celora.detach(model)
    assert untouched == {name: sorted(vars(module)) for name, module in model.named_modules()}


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_copy_computes_with_its_own_weights(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, batch = make_model().train(), {"input_ids": torch.randint(3, 61, (2, 9))}
    celora.attach(model, FUSED)
    expected = model(**batch).logits
    other = copied(model)
    for module, kind in passes.known(other).items():
        assert type(module.forward) is kind
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(**batch).logits.any()
    assert model(**batch).logits.equal(expected)
    original = weakref.ref(model.base_model.model.model.norm)
    del model
    gc.collect()
    assert original() is None
    assert not other(**batch).logits.any()


def test_a_forward_without_its_module_says_so() -> None:
    norm = LlamaRMSNorm(16)
    norm_module.Norm(Switch()).under(norm)
    forward = norm.forward
    del norm
    with pytest.raises(CELoraError, match=r"copy modules by copy\.deepcopy"):
        forward(torch.ones(2, 16))


def test_a_forward_that_a_user_puts_on_top_is_kept() -> None:
    model, batch = make_model().train(), {"input_ids": torch.randint(3, 61, (2, 9))}
    norm = model.base_model.model.model.norm
    celora.attach(model, FUSED)
    expected, ours = 2 * model(**batch).logits, norm.forward
    norm.forward = lambda x: 2 * ours(x)
    torch.testing.assert_close(model(**batch).logits, expected)
    mine = norm.forward
    for _ in range(2):
        celora.detach(model)
        assert norm.forward is mine
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        celora.attach(model, FUSED)
    assert norm not in passes.known(model)


@pytest.mark.parametrize("detached", ["before", "after", "never"])
def test_hooks_of_accelerate_around_it(detached: str) -> None:
    """They keep the forward that they replace, and put it back."""
    model, batch = make_model().train(), {"input_ids": torch.randint(3, 61, (2, 9))}
    celora.attach(model, FUSED)
    expected = model(**batch).logits
    modules = list(passes.known(model))
    for module in modules:
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    assert model(**batch).logits.equal(expected)
    if detached == "before":
        celora.detach(model)
    for module in modules:
        remove_hook_from_module(module)
    if detached == "after":
        celora.detach(model)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    for module in modules:
        assert isinstance(module.forward, OwnForward) is (detached == "never")


def test_a_machine_of_several_accelerators_may_copy_modules_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """As nn.DataParallel does: a copy has all attributes of the original, so its forward would be the original's."""
    model = make_model()
    celora.attach(model, FUSED)
    norm = model.base_model.model.model.norm
    assert norm._replicate_for_data_parallel().forward is norm.forward
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert not passes.known(model)
