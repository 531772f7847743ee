"""Attentions: which rotations celora knows, what it turns in one pass, and what it leaves to the attention."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as turn_pairs
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb as turn_in_float32
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as turn_first

import celora
from celora import CELoraConfig
from celora.kernels.c import library as kernels
from celora.modeling.passes import known as passes
from celora.modeling.passes.rotation import Rotation, calling, calls_turn, turned, turns
from celora.numerics import passes as numerics
from decoders import logit_gradients, model_of
from patching import patch_all
from small import make_batch, make_model
from versions import before

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C compiler")
DTYPES = [torch.float32, torch.bfloat16]
FUSED = CELoraConfig(estimator="dense", fused=True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of everything that is turned in one pass from now on."""
    shapes: list[tuple[int, ...]] = []
    rotated = numerics.rotated
    patch_all(
        monkeypatch,
        "celora.numerics.passes:rotated",
        lambda x, *angles: shapes.append(tuple(x.shape)) or rotated(x, *angles),
    )
    return shapes


ODD: dict[str, tuple[Tensor, Tensor, Tensor, int]] = {
    "another dtype": (torch.ones(1, 3, 5, 8), *torch.rand(2, 1, 5, 8).double(), 1),
    "sine of another dtype": (torch.ones(1, 3, 5, 8), torch.rand(1, 5, 8), torch.rand(1, 5, 8).bfloat16(), 1),
    "heads elsewhere": (torch.ones(1, 5, 3, 8), *torch.rand(2, 1, 5, 8), 2),
    "one angle for all": (torch.ones(3, 2, 5, 8), *torch.rand(2, 3, 1, 8), 1),
    "one sine for two cosines": (torch.ones(2, 3, 5, 8), torch.rand(2, 5, 8), torch.rand(1, 5, 8), 1),
    "a batch of angles": (torch.ones(1, 2, 5, 8), *torch.rand(2, 3, 5, 8), 1),
    "angles that are trained": (torch.ones(1, 3, 5, 8), *torch.rand(2, 1, 5, 8).requires_grad_(), 1),
    "an odd number of angles": (torch.ones(1, 3, 5, 8), *torch.rand(2, 1, 5, 7), 1),
    "no tokens": (torch.ones(1, 3, 0, 8), *torch.rand(2, 1, 0, 8), 1),
    "no batch": (torch.ones(2, 5, 8), *torch.rand(2, 5, 8), 0),
}


@pytest.mark.parametrize("what", ODD)
def test_angles_that_do_not_fit_are_left_to_the_model(what: str, calls: list[tuple[int, ...]]) -> None:
    q, cosine, sine, dim = ODD[what]
    own = functools.partial(turned, apply_rotary_pos_emb)
    if "odd" in what:
        with pytest.raises(RuntimeError):
            own(q, q, cosine, sine)
        return
    expected = apply_rotary_pos_emb(q, q, cosine, sine, unsqueeze_dim=dim)[0]
    rest = (None, dim) if before("transformers", "5") else (dim,)  # unused positions
    for found in (own(q, q, cosine, sine, *rest), own(q, q, cosine, sine, unsqueeze_dim=dim)):
        assert found[0].dtype == expected.dtype
        torch.testing.assert_close(found[0], expected)
    assert calls == []


def test_angles_for_fewer_tokens_are_the_models_own_error() -> None:
    q = torch.ones(1, 3, 9, 8)
    with pytest.raises(RuntimeError):
        turned(apply_rotary_pos_emb, q, q, *torch.rand(2, 1, 5, 8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 12], ids=["all", "first"])
def test_all_or_the_first_coordinates_of_a_head_are_turned(
    size: int, dtype: torch.dtype, calls: list[tuple[int, ...]]
) -> None:
    q, k = torch.randn(2, 3, 5, size).to(dtype), torch.randn(2, 1, 5, size).to(dtype)
    cosine, sine = torch.randn(2, 2, 5, 8).to(dtype)
    expected = turn_first(q, k, cosine, sine)
    for found, true in zip(turned(turn_first, q, k, cosine, sine), expected, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-6)
    turned(turn_first, q, k, cosine, sine, unsqueeze_dim=1)
    assert calls == [(2, 3, 5, 8), (2, 1, 5, 8)] * 2


def test_which_ways_to_turn_are_known() -> None:
    for dtype in DTYPES:
        assert turns(apply_rotary_pos_emb, dtype)
        assert turns(turn_first, dtype)
        assert turns(turn_first, dtype, partly=True)
        assert not turns(apply_rotary_pos_emb, dtype, partly=True)  # this function turns the whole head, not a part
        assert not turns(turn_pairs, dtype)

    def in_float32(q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor) -> list[Tensor]:
        both = apply_rotary_pos_emb(q.float(), k.float(), cosine, sine)
        return [x.to(q.dtype) for x in both]

    assert turns(in_float32)
    assert not turns(in_float32, torch.bfloat16)
    assert turns(turn_in_float32)


def test_an_attention_is_copied_under_its_decorators() -> None:
    """Only the copy calls another function. The class's own forward and its module's function stay as they are."""
    seen: list[str] = []

    def noted(forward: Any) -> Any:
        @functools.wraps(forward)
        def called(*args: Any, **kwargs: Any) -> Any:
            seen.append("decorator")
            return forward(*args, **kwargs)

        return called

    plain = LlamaAttention.forward
    model = make_model().base_model.model
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 5, 48)
    angles = model.model.rotary_emb(x, torch.arange(5)[None])
    expected = plain(attention, x, angles, None)[0]

    def turn(*args: Tensor) -> Any:
        seen.append("turn")
        return apply_rotary_pos_emb(*args)

    for forward in (plain, noted(plain), noted(noted(plain))):
        assert calls_turn(forward)
        seen.clear()
        assert calling(forward, turn)(attention, x, position_embeddings=angles, attention_mask=None)[0].equal(expected)
        assert seen.count("turn") == 1
        forward(attention, x, angles, None)
        assert seen.count("turn") == 1
    assert modeling_llama.apply_rotary_pos_emb is apply_rotary_pos_emb


def test_forwards_that_cannot_be_copied_or_do_not_turn_are_not_known() -> None:
    class Around:
        def __init__(self, forward: Any) -> None:
            self.__wrapped__ = forward

    assert not calls_turn(Around(LlamaAttention.forward))
    assert not calls_turn(torch.nn.Linear.forward)
    assert not calls_turn(len)


def test_the_function_of_the_module_as_it_is_now_is_called(
    monkeypatch: pytest.MonkeyPatch, calls: list[tuple[int, ...]]
) -> None:
    """Others may replace the module's function, for all models."""
    model, batch = make_model().train(), {"input_ids": torch.randint(3, 61, (2, 9))}
    celora.attach(model, FUSED)

    def other(q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        q, k = apply_rotary_pos_emb(q, k, cosine, sine)
        return 2 * q, k

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other)
    found = logit_gradients(model, batch)
    assert calls == []
    celora.detach(model)
    torch.testing.assert_close(found, logit_gradients(model, batch), rtol=1e-4, atol=1e-7)


def test_other_names_of_the_module_are_as_they_are_now(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model().train(), {"input_ids": torch.randint(3, 61, (2, 9))}
    model.base_model.model.set_attn_implementation("eager")
    celora.attach(model, FUSED)
    seen: list[int] = []
    eager = modeling_llama.eager_attention_forward
    monkeypatch.setattr(
        modeling_llama, "eager_attention_forward", lambda *args, **kwargs: seen.append(1) or eager(*args, **kwargs)
    )
    model(**batch)
    assert len(seen) == 2


def test_phi_turns_a_part_of_each_head(calls: list[tuple[int, ...]]) -> None:
    rope: dict[str, Any] = {"partial_rotary_factor": 0.5}
    if not before("transformers", "5"):
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **rope}}
    model, batch = model_of("phi3", **rope), {"input_ids": torch.randint(3, 61, (2, 9))}
    expected = logit_gradients(model, batch)
    celora.attach(model, FUSED)
    torch.testing.assert_close(logit_gradients(model, batch), expected, rtol=1e-3, atol=1e-6)
    assert set(calls) == {(2, 4, 9, 4), (2, 2, 9, 4)}


def test_attentions_that_look_at_their_angles() -> None:
    """DeepSeek's attention reads the shape of its angles. It has two ways to turn, and takes the other one."""
    config = AutoConfig.for_model(
        "deepseek_v3", hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        vocab_size=64, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2,
        n_group=1, topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=2,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lora = LoraConfig(target_modules=["q_b_proj", "o_proj"], r=4, init_lora_weights=False)
    model, batch = get_peft_model(base, lora).train(), {"input_ids": torch.randint(3, 64, (2, 9))}
    expected = logit_gradients(model, batch)
    celora.attach(model, FUSED)
    assert Rotation not in passes.known(model).values()
    torch.testing.assert_close(logit_gradients(model, batch), expected, rtol=1e-3, atol=1e-6)


def test_what_is_never_turned_in_one_pass_is_not_known() -> None:
    """GLM, for example, repeats each angle for two neighbours."""
    config = AutoConfig.for_model(
        "glm", hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=64, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert Rotation not in passes.known(model).values()


def test_recorded_attentions_do_not_end_the_rotations(calls: list[tuple[int, ...]]) -> None:
    model, batch = make_model().train(), {"input_ids": torch.randint(3, 61, (2, 9))}
    model.base_model.model.set_attn_implementation("eager")
    celora.attach(model, FUSED)
    assert model(**batch, output_attentions=True).attentions
    calls.clear()
    model(**batch)
    assert len(calls) == 4


def test_packed_batches_are_turned_in_one_pass(calls: list[tuple[int, ...]]) -> None:
    """An attention finds out by hooks that a batch is packed. These hooks do not stop the pass."""
    model, batch = make_model().train(), make_batch(0)
    batch["labels"][0, 5:] = -100
    celora.attach(model, "exact")
    model(**batch)
    calls.clear()
    model(**batch)
    assert len(calls) == 4
    assert {shape[0] for shape in calls} == {1}
