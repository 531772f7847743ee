"""A base in 8 bits: which layers are stored like this, and how the model trains, is saved and is restored."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import celora
from celora import CELoraConfig, CELoraError
from celora.kernels.backends import available
from celora.machine.memory import saved_for_backward
from celora.modeling.int8_base import original_weights
from celora.modeling.int8_linear import Int8Linear
from celora.modeling.passes.gate import Gate
from celora.modeling.passes.norm import Norm
from celora.modeling.passes.rotation import Rotation
from celora.runtime.attachment import require
from machine import refuses
from small import adapter, make_base, make_batch, make_model, train
from without import as_on_accelerators, without

FEW = ["q_proj", "down_proj"]  # tracing takes a second for each layer
LORA = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False}
BOTH = CELoraConfig(
    estimator="tokens", keep_ratio=0.95, rank=0, selection="energy", precision="int8", forward="int8", refresh_every=3
)


def quantised(**options: object) -> PeftModel:
    model = make_model(**options)
    celora.quantise_base(model)
    return model


def with_plain_twin() -> tuple[PeftModel, PeftModel]:
    """A model in 8 bits, and a model of plain layers that hold the same numbers."""
    model = quantised()
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, Int8Linear):
            module.replace(module.dequantize())
    return model.train(), twin.train()


def gradients(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    model.zero_grad()
    model(**make_batch(seed)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def cosine(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    a, b = (torch.cat([grads[name].flatten() for name in sorted(one)]) for grads in (one, other))
    return float(torch.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize("adapted", [False, True])
def test_linear_layers_in_blocks_are_held_in_8_bits_and_nothing_else(adapted: bool) -> None:
    model = make_model(base_bias=True) if adapted else make_base(base_bias=True)
    plain = {id(p) for name, p in model.named_parameters() if "weight" not in name or "lora" in name or "norm" in name}
    report = celora.quantise_base(model)
    assert len(report.layers) == 14
    assert "14 frozen linear layers in 8 bits" in str(report)
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert all(kinds[name] is Int8Linear for name in report.layers)
    assert [name for name in kinds if name.endswith("lm_head")] != []
    assert all(kind is not Int8Linear for name, kind in kinds.items() if name.endswith(("lm_head", "embed_tokens")))
    assert plain <= {id(p) for p in model.parameters()}
    again = celora.quantise_base(model)
    assert (again.layers, again.bytes_now) == (report.layers, 0)


def test_one_byte_a_number_and_one_scale_an_output() -> None:
    """Sizes of whole panels: a kernel fills up the last panel of any other size."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=61, **sizes))
    shapes = [module.weight.shape for module in model.model.modules() if isinstance(module, nn.Linear)]
    report = celora.quantise_base(model)
    assert report.bytes_before == sum(4 * out * inp for out, inp in shapes)
    assert report.bytes_now == sum(out * inp + 4 * out for out, inp in shapes)


def test_before_or_after_the_adapter_is_the_same_model() -> None:
    after = quantised()
    base = make_base()
    celora.quantise_base(base)
    before = get_peft_model(base, LoraConfig(**LORA))
    assert type(before.base_model.model.model.layers[0].mlp.up_proj).__module__ == "peft.tuners.lora.layer"
    before.load_state_dict(after.state_dict())
    expected, found = gradients(after.train()), gradients(before.train())
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)


def test_plain_peft_trains_on_it_as_on_the_numbers_it_holds() -> None:
    model, twin = with_plain_twin()
    expected, found = gradients(twin), gradients(model)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("config", ["exact", "paper", BOTH, CELoraConfig(estimator="int8", refresh_every=3)])
def test_estimates_compose_as_on_a_plain_base(config: str | CELoraConfig) -> None:
    if refuses():
        return
    model, twin = with_plain_twin()
    exact = gradients(copy.deepcopy(twin))
    for each in (model, twin):
        celora.attach(each, config)
        train(each, 4)
    assert require(model).relative_errors.keys() == require(twin).relative_errors.keys()
    found, expected = require(model).relative_errors, require(twin).relative_errors
    apart = [name for name, error in expected.items() if found[name] != pytest.approx(error, rel=0.2, abs=2e-3)]
    # By energy, rounding may decide about a token: up to sqrt(0.05) = 0.22 of a gradient, which W may stretch.
    assert len(apart) <= (1 if config is BOTH else 0)
    assert all(max(found[name], expected[name]) < 0.3 for name in apart)
    assert [name for name, graft in require(model).grafts.items() if graft.estimator.product.holds_copy] == []
    assert len(require(model).forwards) == (14 if config is BOTH else 0)
    celora.detach(model)
    assert adapter(model).keys() == adapter(twin).keys()
    assert gradients(model).keys() == exact.keys()


def test_attached_both_ways_holds_one_copy() -> None:
    if refuses():
        return
    model, _ = with_plain_twin()
    celora.attach(model, BOTH)
    train(model, 2)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    for graft in require(model).grafts.values():
        base = layers[f"{graft.name}.base_layer"]
        assert graft.estimator.product._multiplied_with(base.weight).stored.data_ptr() == base.W_q.data_ptr()
        assert not graft.estimator.product.holds_copy


def test_attached_both_ways_activations_are_saved_in_8_bits() -> None:
    """With the same loss, and nearly the same gradient. A base in its own dtype, or an exact forward, keeps them."""
    if refuses() or not available("rms_norm", torch.empty(1)):
        return
    model, found = quantised().train(), {}
    note = "activations saved for the backward in 8 bits"
    assert note in str(celora.attach(model, BOTH, fused=True))
    switch = require(model).switch
    for switch.compact in (True, False):
        model.zero_grad()
        with saved_for_backward(model) as saved:
            loss = model(**make_batch(0)).loss
        found[switch.compact] = loss.detach(), saved.nbytes, gradients(model)
    (loss, fewer, grads), (same, more, exactly) = found[True], found[False]
    assert loss == same
    assert fewer < 0.75 * more
    assert 0.99 < cosine(grads, exactly) < 1
    exactly = {}
    for switch.compact in (True, False):  # an audit compares with the exact gradient
        with switch.own_forwards():
            exactly[switch.compact] = gradients(model)
    assert all(grad.equal(exactly[False][name]) for name, grad in exactly[True].items())
    for forward in require(model).forwards.values():  # as a refresh decides when errors are large
        forward.exact = True
    require(model).set_modes(1)
    assert not switch.compact
    for other, config in ((model, "exact"), (make_model().train(), BOTH)):
        assert note not in str(celora.attach(other, config, fused=True))
        assert not require(other).switch.compact


def test_on_accelerators_norms_and_gates_save_in_8_bits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's operators, as this CPU computes here. Without a base in 8 bits they stay the model's own."""
    without(monkeypatch, "c")
    if refuses():
        return
    expected = quantised().train()
    celora.attach(expected, BOTH, fused=True)
    as_on_accelerators(monkeypatch)
    model, other = quantised().train(), make_model().train()
    for attached in (model, other):
        celora.attach(attached, BOTH, fused=True)
    kinds, others = (Counter(type(m.__dict__.get("forward")) for m in each.modules()) for each in (model, other))
    assert (kinds[Norm], kinds[Gate], kinds[Rotation], others[Norm], others[Gate]) == (5, 2, 0, 0, 0)
    sizes = []
    for trained in (expected, model):
        with saved_for_backward(trained) as saved:
            trained(**make_batch(0))
        sizes.append(saved.nbytes)
    assert sizes[1] < 0.75 * sizes[0]
    assert 0.99 < cosine(gradients(model), gradients(expected)) < 1


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_checkpointing_gives_the_same_bits(reentrant: bool, fused: bool) -> None:
    if refuses():
        return
    plain, checkpointed = quantised().train(), quantised().train()
    for model in (plain, checkpointed):
        celora.attach(model, BOTH, fused=fused)
        model.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    expected, found = gradients(plain), gradients(checkpointed)
    assert all(found[name].equal(expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
def test_compiled_it_computes_the_same_without_a_break() -> None:
    if refuses():
        return
    model, other = (quantised(layers=1, target_modules=FEW).train() for _ in range(2))
    for each in (model, other):
        celora.attach(each, BOTH, labelled_head=False)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for step in range(2):  # a refresh, and an estimate
        expected = gradients(model, step)
        other.zero_grad()
        compiled(**make_batch(step)).loss.backward()
        for name, p in other.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-4)
        for each in (model, other):
            torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.0).step()
    assert len(require(other).forwards.errors) == len(FEW)


def test_a_copy_trains_on_alone() -> None:
    if refuses():
        return
    model = quantised()
    celora.attach(model, BOTH)
    train(model, 2)
    other = copy.deepcopy(model)
    train(model, 2, first=2)
    train(other, 2, first=2)
    ours, others = adapter(model), adapter(other)
    assert all(ours[name].equal(others[name]) for name in ours)
    held = {module.W_q.data_ptr() for module in model.modules() if isinstance(module, Int8Linear)}
    assert held.isdisjoint(module.W_q.data_ptr() for module in other.modules() if isinstance(module, Int8Linear))


def test_the_adapter_is_plain_peft_and_loads_on_the_untouched_base(tmp_path: Path) -> None:
    model = quantised()
    train(model, 2)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path, is_trainable=True)
    ours, theirs = adapter(model), adapter(loaded)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    close = loaded.eval()(**make_batch(0)).loss, model.eval()(**make_batch(0)).loss
    torch.testing.assert_close(*close, rtol=1e-3, atol=0)


def from_folder(folder: Path) -> tuple[PeftModel, nn.Module]:
    """A model in 8 bits that was loaded from a folder, with an adapter; and the untouched model."""
    make_base().save_pretrained(folder)
    untouched = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    celora.quantise_base(model)
    return get_peft_model(model, LoraConfig(**LORA)), untouched


def test_merging_and_restoring_give_the_original_weights(tmp_path: Path) -> None:
    model, untouched = from_folder(tmp_path)
    weights = dict(untouched.named_parameters())
    deltas = {n: m.get_delta_weight("default") for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    merged = model.merge_and_unload()
    assert deltas
    for name, delta in deltas.items():
        layer = name.removeprefix("base_model.model.")
        assert merged.get_submodule(layer).weight.equal(weights[f"{layer}.weight"] + delta)
    celora.quantise_base(untouched)
    celora.restore_base(untouched)
    assert all(type(m) is not Int8Linear for m in untouched.modules())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(p.equal(dict(again.named_parameters())[name]) for name, p in untouched.named_parameters())


@pytest.mark.parametrize("safe", [False, True])
def test_an_adapter_that_merges_in_place_is_merged(safe: bool, tmp_path: Path) -> None:
    """OFT writes into the weight that it has read."""
    make_base().save_pretrained(tmp_path)
    merged = []
    for in_8_bits in (False, True):
        base = AutoModelForCausalLM.from_pretrained(tmp_path)
        if in_8_bits:
            celora.quantise_base(base)
        torch.manual_seed(0)
        model = get_peft_model(base, OFTConfig(oft_block_size=4, target_modules=["q_proj"], init_weights=False))
        merged.append(model.merge_and_unload(safe_merge=safe).get_submodule("model.layers.0.self_attn.q_proj"))
    assert type(merged[1]) is nn.Linear
    assert merged[1].weight.equal(merged[0].weight)


def test_a_base_that_was_made_here_is_neither_merged_nor_restored() -> None:
    model = quantised()
    with pytest.raises(CELoraError, match="load the model in its own dtype"):
        model.merge_and_unload()
    with pytest.raises(CELoraError, match=r"q_proj.*stays in 8 bits: it is not known where"):
        celora.restore_base(model)


def test_loss_on_the_untouched_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are compared with the bytes before the first forward, and not again."""
    model, untouched = from_folder(tmp_path)
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        expected, held = untouched.eval()(**make_batch(0)).loss, model(**make_batch(0)).loss
        with original_weights(model):
            monkeypatch.setattr(Int8Linear, "original", None)
            found = model(**make_batch(0)).loss
        assert model(**make_batch(0)).loss == held
    assert found == expected != held


def test_what_cannot_be_held_in_8_bits_is_said() -> None:
    with pytest.raises(CELoraError, match=r"no frozen nn.Linear in numbered blocks"):
        celora.quantise_base(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=4)))
    attached = make_model()
    celora.attach(attached, "exact")
    with pytest.raises(CELoraError, match=r"has hooks, as celora.attach.*quantise first"):
        celora.quantise_base(attached)
    merged = make_model()
    merged.merge_adapter()
    with pytest.raises(CELoraError, match="merged into its base"):
        celora.quantise_base(merged)
    with pytest.raises(CELoraError, match="not in memory"):
        celora.quantise_base(make_base().to("meta"))
    broken = make_base()
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(CELoraError, match=r"'model.layers.1.mlp.up_proj' cannot be stored in 8 bits.*not finite"):
        celora.quantise_base(broken)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_an_adapter_that_would_change_the_base_comes_first(init: str) -> None:
    """It would put a float weight in the place of the bytes. After it, what it leaves of the base is stored."""
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init)
    base = make_base()
    celora.quantise_base(base)
    with pytest.raises(CELoraError, match=r"get_peft_model first, and celora\.quantise_base\(model\) after it"):
        get_peft_model(base, lora)
    assert sum(isinstance(module, Int8Linear) for module in base.modules()) == 14
    model = get_peft_model(make_base(), lora)
    expected = model(**make_batch(0)).loss.item()
    assert len(celora.quantise_base(model).layers) == 14
    assert model(**make_batch(0)).loss.item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # of PEFT's hook in the first block
def test_lora_ga_comes_first_too(tmp_path: Path) -> None:
    """It is refused when it prepares a base in 8 bits, and what it has prepared is not quantised away."""
    peft = pytest.importorskip("peft", "0.21")
    lora = LoraConfig(r=4, target_modules=["up_proj"], init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    base, cache = make_base(), tmp_path / "gradients.pt"
    peft.preprocess_loraga(base, lora, lambda: base(**make_batch(0)).loss.backward(), str(cache))
    with pytest.raises(CELoraError, match=r"up_proj' cannot be stored .* LoRA-GA .*; call get_peft_model first"):
        celora.quantise_base(base)
    held = make_base()
    celora.quantise_base(held)
    for gradients in (None, str(cache)):
        with pytest.raises(CELoraError, match=r"LoRA-GA and KaSA change base weights.* get_peft_model first, and"):
            peft.preprocess_loraga(held, lora, lambda: held(**make_batch(0)).loss.backward(), gradients)
    assert sum(isinstance(module, Int8Linear) for module in held.modules()) == 14
    model = get_peft_model(base, lora)
    expected = model(**make_batch(0)).loss.item()
    assert len(celora.quantise_base(model).layers) == 14
    assert model(**make_batch(0)).loss.item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.filterwarnings("ignore:.* changes the base weights:UserWarning")  # PEFT's, while it converts
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_an_adapter_that_changed_the_base_is_exported_as_plain_lora(init: str, tmp_path: Path) -> None:
    """As the refusal to merge says: its initialisation may be random, so loading cannot repeat it."""
    make_base().save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora)
    model.save_pretrained(tmp_path / "before")
    celora.quantise_base(model)
    train(model, 2)
    expected = model.eval()(**make_batch(9)).loss.item()
    with pytest.raises(CELoraError, match=r"initialisation of an adapter changed it before; .*_for_weight_conversion"):
        model.merge_and_unload()
    with pytest.raises(CELoraError, match=r"stays in 8 bits: .* is not the weight that was quantised"):
        celora.restore_base(model)
    model.save_pretrained(tmp_path / "after", path_initial_model_for_weight_conversion=str(tmp_path / "before"))
    untouched = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    merged = PeftModel.from_pretrained(untouched, tmp_path / "after").merge_and_unload()
    assert merged.eval()(**make_batch(9)).loss.item() == pytest.approx(expected, rel=1e-3)


def test_layers_that_train_stay_as_they_are() -> None:
    model = make_model(target_modules=["q_proj"], modules_to_save=["up_proj"])
    report = celora.quantise_base(model)
    assert not any("up_proj" in name for name in report.layers)
    assert len(report.layers) == 12
