"""Packed and padded batches give the same loss and gradients, for every kind of model that can be packed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import celora
from celora.errors import CELoraError
from celora.modeling import packing
from decoders import PACKED, model_of
from labelled import gradients, ragged
from patching import patch_all
from tolerances import OF_GRADIENT
from without import pretend


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_equals_padded(kind: str, left: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of(kind), ragged([11, 4, 7, 1], left=left)
    loss, expected = gradients(model, batch)
    report = celora.attach(model, "exact")
    assert "Padding left out of training batches." in report.notes
    packed, pack = list[Any](), packing.pack
    patch_all(monkeypatch, "celora.modeling.packing:pack", lambda *args: packed.append(pack(*args)) or packed[-1])
    found, gradient = gradients(model, batch)
    assert [tuple(inputs["input_ids"].shape) for inputs in packed] == [
        (1, 10 + 3 + 6)
    ]  # padding, last tokens and the sequence of one token are left out
    assert found == pytest.approx(loss, rel=1e-6)
    assert (gradient - expected).norm() < OF_GRADIENT * expected.norm()
    again, _ = gradients(model, batch)  # the first call was compared with the model's own logits, this one is not
    assert again == found


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3"])
def test_twenty_steps_of_the_exact_preset_end_where_plain_peft_does(kind: str) -> None:
    """`exact` leaves out everything that it can at once, on ragged batches whose prompts have no labels."""
    torch.manual_seed(1)
    batches = [ragged(torch.randint(3, 20, (5,)).tolist(), prompt=int(torch.randint(0, 3, ()))) for _ in range(20)]
    ends = []
    for preset in ("off", "exact"):
        model = model_of(kind)
        celora.attach(model, preset)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        before = torch.cat([p.detach().flatten().clone() for p in trained])
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(torch.cat([p.detach().flatten() for p in trained]))
    assert (ends[0] - before).abs().max() > 5e-3
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.integers(0, 6),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_any_batch(lengths: list[int], prompt: int, left: bool, seed: int) -> None:
    torch.manual_seed(seed)
    batch = ragged(lengths, prompt=prompt, left=left)
    if not (batch["labels"][:, 1:] != -100).any():
        return
    model = _MODEL.setdefault("model", model_of("llama"))
    loss, expected = gradients(model, batch)
    celora.attach(model, "exact")
    found, gradient = gradients(model, batch)
    celora.detach(model)
    assert found == pytest.approx(loss, rel=2e-6)
    assert (gradient - expected).norm() < OF_GRADIENT * expected.norm()


_MODEL: dict[str, nn.Module] = {}


def pack(
    batch: dict[str, Tensor], dtype: torch.dtype = torch.float32, position_ids: Tensor | None = None
) -> dict[str, Any] | None:
    return pack_for(model_of("llama").to(dtype).base_model.model, batch, position_ids)


def pack_for(model: nn.Module, batch: dict[str, Tensor], position_ids: Tensor | None = None) -> dict[str, Any] | None:
    labelled = nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:] != -100
    kept, numbers = packing.measure(labelled, batch["attention_mask"])
    return packing.pack(model, batch["input_ids"], position_ids, kept, numbers.tolist())


def test_batches_with_a_mask_are_packed_for_our_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernel is worth packing for, even if there is hardly any padding to save."""
    full = ragged([32, 32, 32])
    pretend(monkeypatch, "attention", there=True)
    assert pack(full, torch.bfloat16) is None
    nearly = ragged([32] * 7 + [29])
    assert pack(nearly, torch.bfloat16) is not None  # our kernel takes no mask
    assert pack(nearly) is not None
    assert pack(nearly, torch.float16) is None
    pretend(monkeypatch, "attention", there=False)
    assert pack(nearly) is None


def test_what_is_left_alone() -> None:
    torch.manual_seed(0)
    batch = ragged([11, 4, 7])
    assert pack(batch) is not None
    full = ragged([32, 32, 32])
    assert pack(full) is None  # there is nothing to gain
    holes = {**batch, "attention_mask": batch["attention_mask"].clone()}
    holes["attention_mask"][0, 3] = 0
    assert pack(holes) is None  # the mask is not padding
    numbered = {**batch, "attention_mask": torch.tensor([[1] * 3 + [2] * 8, [1] * 4 + [0] * 7, [1] * 7 + [0] * 4])}
    assert pack(numbered) is None  # its rows hold several sequences already
    padded = {**batch, "labels": batch["labels"].clone()}
    padded["labels"][1, 8] = 5
    assert pack(padded) is None  # a label would be predicted from padding
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert pack(nothing) is None


def test_trailing_tokens_without_label_are_left_out() -> None:
    batch = ragged([12, 12])
    batch["labels"][:, 6:] = -100
    packed = pack(batch)
    assert packed is not None
    assert packed["celora_lengths"] == (5, 5)


def test_positions_are_kept() -> None:
    batch = ragged([5, 3], left=True)
    positions = torch.arange(5).expand(2, 5) + 100
    packed = pack(batch, position_ids=positions)
    assert packed is not None
    assert packed["position_ids"].tolist() == [[100, 101, 102, 103, 102, 103]]


def test_a_sequence_longer_than_the_sliding_window_stays_padded() -> None:
    model, batch = model_of("mistral"), ragged([12, 3, 3])
    model.config.sliding_window = 8
    loss, expected = gradients(model, batch)
    celora.attach(model, "exact")
    with pytest.warns(UserWarning, match="padding stays in batches with a row longer than the sliding window of 8 tok"):
        found, gradient = gradients(model, batch)
    assert found == pytest.approx(loss, rel=1e-6)
    assert (gradient - expected).norm() < OF_GRADIENT * expected.norm()


@pytest.mark.parametrize("ids", [None, torch.arange(10, 20).expand(2, -1)])
def test_rotary_embeddings_that_have_seen_a_longer_batch_are_the_models_own(ids: torch.Tensor | None) -> None:
    """Transformers then computes them anew once the largest position is small enough, and packing makes it smaller."""
    long, short = (
        {"input_ids": torch.randint(0, 61, (2, n), generator=torch.Generator().manual_seed(n)),
         "attention_mask": torch.ones(2, n, dtype=torch.long)}
        for n in (24, 16 if ids is None else 10)
    )  # fmt: skip
    long["labels"], short["labels"] = long["input_ids"].clone(), short["input_ids"].clone()
    short["attention_mask"][0, 5:], short["labels"][:, 5:] = 0, -100
    if ids is not None:
        short["position_ids"] = ids

    def losses(preset: str | None) -> list[float]:
        rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        model = model_of("llama", rope_parameters=rope, max_position_embeddings=16).train()
        if preset:
            celora.attach(model, preset)
        return [model(**batch).loss.item() for batch in (long, short, short)]

    assert losses("exact") == pytest.approx(losses(None), rel=1e-6)


def test_where_rotary_embeddings_depend_on_the_length() -> None:
    of_its_own = {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 16}}
    before_version_5 = {"rope_scaling": {"rope_type": "longrope"}, "original_max_position_embeddings": 16}
    for rope in (of_its_own, before_version_5):
        assert packing._longest(SimpleNamespace(max_position_embeddings=64, **rope)) == 16
    assert packing._longest(SimpleNamespace(max_position_embeddings=64, rope_parameters={"rope_type": "default"})) > 64


def test_other_models_stay_padded() -> None:
    assert "gpt2" in packing.cannot_pack(AutoModelForCausalLM.from_config(AutoConfig.for_model(
        "gpt2", n_embd=8, n_layer=1, n_head=2, vocab_size=16)))  # fmt: skip
    eager = model_of("llama").base_model.model
    eager.set_attn_implementation("eager")
    assert "eager" in packing.cannot_pack(eager)
    assert packing.cannot_pack(nn.Linear(2, 2))


class PrefixLM(LlamaForCausalLM):
    """Attends to all of the first tokens of a row."""

    def forward(self, input_ids: Tensor, labels: Tensor, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        columns = input_ids.shape[1]
        seen = torch.ones(columns, columns, dtype=torch.bool).tril()
        seen[:3, :3] = True
        mask = seen & (kwargs.pop("attention_mask") != 0)[:, None, None]
        logits = super().forward(input_ids, attention_mask=mask, logits_to_keep=logits_to_keep, **kwargs).logits
        return CausalLMOutputWithPast(loss=self.loss_function(logits, labels, self.config.vocab_size), logits=logits)


def _sees_all(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Tensor:
    """A mask that hides padding alone. The rows have 11 tokens, whoever asks."""
    seen = attention_mask != 0 if attention_mask is not None else torch.ones(3, 11, dtype=torch.bool)
    return seen[:, None, None].expand(3, 1, 11, 11)


def _halved(*args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    output, weights = sdpa_attention_forward(*args, **kwargs)
    return output / 2, weights


@contextlib.contextmanager
def _replaced(what: str, model: Any) -> Iterator[None]:
    functions: Any = {"masks": ALL_MASK_ATTENTION_FUNCTIONS, "attention": ALL_ATTENTION_FUNCTIONS}.get(what)
    if what == "class":
        model.__class__ = PrefixLM
        yield
    elif what == "function":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(modeling_llama, "create_causal_mask", _sees_all)
            yield
    else:
        functions["sdpa"] = {"masks": _sees_all, "attention": _halved}[what]
        try:
            yield
        finally:
            del functions["sdpa"]  # the one that stands for all is there again


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("class", "the forward of PrefixLM is "),
        ("function", r"test_packing\._sees_all makes its attention mask"),
        ("masks", r"test_packing\._sees_all makes its attention mask"),
        ("attention", "attn_implementation='sdpa' is not Transformers' own"),
    ],
)
def test_attention_that_is_anothers_keeps_padding(what: str, said: str) -> None:
    model, batch = model_of("llama").train(), ragged([11, 4, 7])
    with _replaced(what, model.get_base_model()):
        expected, exact = gradients(model, batch)
        assert re.search(said, str(celora.attach(model, "exact")))
        for _ in range(2):
            found, gradient = gradients(model, batch)
            assert found == pytest.approx(expected, rel=1e-6)
            assert (gradient - exact).norm() < OF_GRADIENT * exact.norm()


def test_masks_that_torch_compiles_are_still_transformers_own() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama, "create_causal_mask", torch.compiler.disable(modeling_llama.create_causal_mask))
        assert packing.cannot_pack(model_of("llama").get_base_model()) == ""


def test_a_mask_that_is_made_for_a_packed_batch_is_an_error() -> None:
    model, batch = model_of("llama").train(), ragged([11, 4, 7])
    celora.attach(model, "exact")

    def sees_all(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = torch.ones(3, 1, 11, 11, dtype=torch.bool)
        return args, {**kwargs, "attention_mask": mask}

    sees_all.__module__ = "accelerate.hooks"  # of anybody else, the model's own loss would be used
    model.get_base_model().register_forward_pre_hook(sees_all, with_kwargs=True)  # after celora's own
    with pytest.raises(CELoraError, match="an attention mask of its own for a packed batch"):
        model(**batch)


def test_flash_attention_gets_the_lengths_its_own_way() -> None:
    batch = ragged([5, 3])
    model = model_of("llama").base_model.model
    model.config._attn_implementation_internal = "flash_attention_2"
    packed = pack_for(model, batch)
    assert packed is not None
    assert packed["attention_mask"] is None
    assert packed["cu_seq_lens_q"].tolist() == [0, 4, 6]
    assert packed["max_length_q"] == 4


def test_masks_by_kind_of_layer_are_the_models_own() -> None:
    """A caller may make a mask for each kind of layer itself."""
    torch.manual_seed(0)
    model, batch = model_of("qwen2").train(), ragged([11, 4, 7])
    batch["attention_mask"] = {"full_attention": None}
    expected, exact = gradients(model, batch)
    celora.attach(model, "exact")
    for _ in range(2):
        found, gradient = gradients(model, batch)
        assert found == pytest.approx(expected, rel=1e-6)
        assert (gradient - exact).norm() < 1e-5 * exact.norm()
