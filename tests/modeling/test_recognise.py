"""Finds what models do to their logits, even if the configuration does not say so, and however small the logits are."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    Cohere2Config,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    SiglipVisionConfig,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.moshi.modeling_moshi import MoshiCausalLMOutputWithPast

import celora
from celora.modeling.recognise import sweep
from celora.numerics.head import Logits
from celora.runtime.attachment import require
from small import make_model
from versions import before

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = SiglipVisionConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14
)


def gemma3(**text: Any) -> nn.Module:
    text = {"model_type": "gemma3_text", **SMALL, "sliding_window": 64, **text}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=VISION.to_dict(), mm_tokens_per_image=4, image_token_id=60,
                     boi_token_id=61, eoi_token_id=62)
    )  # fmt: skip


def recurrent_gemma() -> nn.Module:
    return RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**SMALL, lru_width=32, attention_window_size=64))


def cohere_vision() -> nn.Module:
    return Cohere2VisionForConditionalGeneration(
        Cohere2VisionConfig(vision_config=VISION, text_config=Cohere2Config(**SMALL, logit_scale=0.25))
    )


class _Changed(LlamaForCausalLM):
    """Changes its logits in a way that no name in its configuration says."""

    def change(self, logits: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, *args: Any, labels: Tensor | None = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        logits = self.change(super().forward(*args, logits_to_keep=logits_to_keep, **kwargs).logits)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class Capped(_Changed):
    def change(self, logits: Tensor) -> Tensor:
        return 30 * torch.tanh(logits / 30)


class Scaled(_Changed):
    def change(self, logits: Tensor) -> Tensor:
        return logits * 1.03


class Masked(_Changed):
    """Leaves out a word. Models with a padded vocabulary do so."""

    def change(self, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor([63], device=logits.device), -1e4)


class MaskedInPlace(_Changed):
    """Chameleon, for example, forbids the words of images so."""

    def change(self, logits: Tensor) -> Tensor:
        logits[..., 63] = -1e4
        return logits


class ScaledInPlace(_Changed):
    def change(self, logits: Tensor) -> Tensor:
        return logits.mul_(1.03)


LLAMA = {key: value for key, value in SMALL.items() if key != "head_dim"}
KNOWN: dict[str, tuple[Callable[[], nn.Module], Logits]] = {
    "RecurrentGemma": (recurrent_gemma, Logits(1.0, 30.0)),
    "Gemma 2": (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL)), Logits(1.0, 30.0)),
    "Granite": (lambda: GraniteForCausalLM(GraniteConfig(**LLAMA, logits_scaling=8.0)), Logits(1 / 8)),
    "Gemma 3 with images": (lambda: gemma3(), Logits()),
    "Cohere 2 with images, which ignores its scale": (cohere_vision, Logits()),
    "Llama": (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)), Logits()),
}
CHANGED = (Capped, Scaled, Masked, MaskedInPlace, ScaledInPlace)
UNKNOWN = {kind.__name__: functools.partial(kind, LlamaConfig(**LLAMA)) for kind in CHANGED}


def adapted(make: Callable[[], nn.Module], dtype: torch.dtype) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4, init_lora_weights=False)
    model = get_peft_model(make().to(dtype), config, autocast_adapter_dtype=False).train()
    model.config.get_text_config().use_cache = False
    return model


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def gradients(model: nn.Module, given: dict[str, Any]) -> tuple[float, Tensor]:
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])


def closeness(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.filterwarnings("ignore:.*(scan|use_cache|inputs_embeds|torch.jit).*")
def test_what_is_done_to_the_logits_is_known(kind: str, dtype: torch.dtype) -> None:
    if "Recurrent" in kind and before("transformers", "5"):
        pytest.skip("Transformers 4 trains it for one step only, without celora, too")
    make, expected = KNOWN[kind]
    model, given = adapted(make, dtype), batch()
    if "images" in kind:
        given["token_type_ids"] = torch.zeros_like(given["input_ids"])
    given = {k: v for k, v in given.items() if k != "token_type_ids" or "Gemma" in kind}
    loss, gradient = gradients(model, given)
    celora.attach(model, "exact")
    for _ in range(2):
        found, ours = gradients(model, given)
        assert found == pytest.approx(loss, rel=closeness(dtype) / 10)
        assert (ours - gradient).norm() < closeness(dtype) * gradient.norm()
    if "Gemma 3" in kind and before("transformers", "5.18"):
        assert "Gemma3ForConditionalGeneration has a loss of its own" in str(require(model).report)
    else:
        assert require(model).forward.logits == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_is_not_known_is_left_to_the_model(kind: str, dtype: torch.dtype) -> None:
    """While logits are small, a cap of 30 changes them by less than rounding does."""
    model, given = adapted(UNKNOWN[kind], dtype), batch()
    with torch.no_grad():
        model.base_model.model.lm_head.weight.mul_(1 / 64)
    loss, gradient = gradients(model, given)
    celora.attach(model, "exact")
    with pytest.warns(UserWarning, match=f"{kind} does something to its logits that is not known; its own loss"):
        found, _ = gradients(model, given)
    again, ours = gradients(model, given)
    assert found == again
    assert found == pytest.approx(loss, rel=closeness(dtype) / 10)
    assert (ours - gradient).norm() < closeness(dtype) * gradient.norm()


def test_a_setting_that_changes_is_followed() -> None:
    model, given = adapted(KNOWN["Gemma 2"][0], torch.float32), batch()
    celora.attach(model, "exact")
    for cap in (30.0, 0.5, None):
        model.base_model.model.config.final_logit_softcapping = cap
        found, ours = gradients(model, given)
        assert require(model).forward.logits == Logits(1.0, cap)
        require(model).switch.on = False
        loss, gradient = gradients(model, given)
        require(model).switch.on = True
        assert found == pytest.approx(loss, rel=1e-6)
        assert (ours - gradient).norm() < 1e-5 * gradient.norm()


def test_a_number_of_the_model_that_changes_is_followed() -> None:
    """Cohere reads its scale from an attribute."""
    config = CohereConfig(**LLAMA, logit_scale=0.25)
    model, given = adapted(lambda: CohereForCausalLM(config), torch.float32), batch()
    plain = copy.deepcopy(model)
    celora.attach(model, "exact")
    for scale in (0.25, 3.0):
        for each in (model, plain):
            each.base_model.model.logit_scale = scale
        given = given | {"labels": given["labels"].clone()}  # the same tensor would be the same call, which probes
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found, ours = gradients(model, given)
        expected, exact = gradients(plain, given)
        assert found == pytest.approx(expected, rel=1e-6)
        assert (ours - exact).norm() < 1e-5 * exact.norm()
    assert require(model).forward.refused
    assert [str(warning.message) for warning in caught if "its own loss is used" in str(warning.message)]


class Showing(LlamaForCausalLM):
    """Returns the hidden states of the tokens whose logits it computes. Moshi does so."""

    def forward(self, *args: Any, labels: Tensor | None = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        hidden = self.model(*args, **kwargs)[0]
        hidden = hidden[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        logits = self.lm_head(hidden)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return MoshiCausalLMOutputWithPast(loss=loss, logits=logits, last_hidden_state=hidden)


def test_hidden_states_beside_the_logits_stay_whole() -> None:
    model, given = adapted(lambda: Showing(LlamaConfig(**LLAMA)), torch.float32), batch()
    expected = model(**given)
    celora.attach(model, "exact")
    with pytest.warns(UserWarning, match="Showing returns more than logits of the tokens"):
        found = model(**given)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(found.loss, expected.loss)


def doubled(layer: nn.Module) -> Callable[..., Tensor]:
    return lambda x: 2 * nn.Linear.forward(layer, x)


@pytest.mark.parametrize("what", ["head", "partial", "model"])
@pytest.mark.parametrize("after", [True, False], ids=["after a step", "before attaching"])
def test_a_replaced_forward_is_seen(what: str, after: bool) -> None:
    model, given = make_model().train(), batch()
    causal = model.base_model.model
    plain = copy.deepcopy(model)

    def replace(causal: Any) -> None:
        if what == "head":
            causal.lm_head.forward = doubled(causal.lm_head)
        else:

            def more(self: Any, *args: Any, **kwargs: Any) -> Any:
                output = type(self).forward(self, *args, **kwargs)
                output["loss"] = None if output.loss is None else output.loss + 1
                return output

            causal.forward = functools.partial(more, causal) if what == "partial" else more.__get__(causal)

    replace(plain.base_model.model)
    loss, gradient = gradients(plain, given)
    if not after:
        replace(causal)
    report = celora.attach(model, "exact")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if after:
            model(**given)
            replace(causal)
        found, ours = gradients(model, given)
        gradients(model, given)
    assert found == pytest.approx(loss, rel=1e-6)
    assert (ours - gradient).norm() < 1e-5 * gradient.norm()
    said = [str(warning.message) for warning in caught]
    assert len([text for text in said if "was replaced by test_recognise." in text]) == int(after)
    assert any("was replaced by test_recognise." in note for note in report.notes) is not after


@pytest.mark.filterwarnings("ignore:celora. padding stays in batches")
def test_a_hook_on_the_decoder_after_the_first_step_is_seen() -> None:
    model, given = make_model().train(), batch()
    celora.attach(model, "exact")
    gradients(model, given)
    model.get_base_model().model.register_forward_hook(
        lambda module, args, output: type(output)(last_hidden_state=2 * output[0])
    )
    plain = copy.deepcopy(model)
    celora.detach(plain)
    with pytest.warns(UserWarning, match="its own loss is used"):
        loss, found = gradients(model, given)
    expected, exact = gradients(plain, given)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert (found - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("later", [False, True])
def test_another_cross_entropy_in_torchs_place_is_the_models_own_loss(
    later: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = make_model().train(), batch()
    if later:
        celora.attach(model, "exact")
        assert model(**given).logits is None
    smoothed = functools.partial(torch.nn.functional.cross_entropy, label_smoothing=0.3)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", smoothed)
    plain = copy.deepcopy(model)
    celora.detach(plain)
    loss, gradient = gradients(plain, given)
    if not later:
        celora.attach(model, "exact")
    with pytest.warns(UserWarning, match="has a loss of its own"):
        found, ours = gradients(model, given)
    assert found == pytest.approx(loss, rel=1e-6)
    assert (ours - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("items", [0, torch.tensor(0)])
def test_a_batch_of_no_items_has_an_infinite_loss(items: Any) -> None:
    model, given = make_model().train(), batch()
    celora.attach(model, "exact")
    for _ in range(2):
        assert model(**given, num_items_in_batch=items).loss.item() == float("inf")


def test_a_model_that_ignores_the_number_of_items_is_seen() -> None:
    """Trainer divides by this number under accumulation. Its first call may have none."""
    model, given = adapted(lambda: Plain(LlamaConfig(**LLAMA)), torch.float32), batch()
    loss, _ = gradients(model, given | {"num_items_in_batch": 7})
    celora.attach(model, "exact")
    assert model(**given).logits is None
    with pytest.warns(UserWarning, match="Plain has a loss of its own"):
        found, _ = gradients(model, given | {"num_items_in_batch": 7})
    assert found == pytest.approx(loss, rel=1e-6)


class Before(LlamaForCausalLM):
    """Scales what its head is given. The head has a bias, which is not scaled."""

    def forward(self, input_ids: Tensor, labels: Tensor, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        hidden = self.model(input_ids, attention_mask=kwargs.get("attention_mask"))[0]
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep] * self.config.logits_scaling)
        return CausalLMOutputWithPast(loss=self.loss_function(logits, labels, self.config.vocab_size), logits=logits)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.filterwarnings("ignore:.*its own loss is used.*")
def test_a_bias_behind_scaled_hidden_states(bias: bool) -> None:
    def make() -> nn.Module:
        model = Before(LlamaConfig(**LLAMA, logits_scaling=0.25, tie_word_embeddings=False))
        if bias:
            model.lm_head.bias = nn.Parameter(torch.randn(64))
        return model

    model, given = adapted(make, torch.float32), batch()
    loss, gradient = gradients(model, given)
    celora.attach(model, "exact")
    assert (model(**given).logits is None) == (not bias)
    found, ours = gradients(model, given)
    assert found == pytest.approx(loss, rel=1e-6)
    assert (ours - gradient).norm() < 1e-5 * gradient.norm()


class Plain(_Changed):
    def change(self, logits: Tensor) -> Tensor:
        return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sweep_has_every_size(dtype: torch.dtype) -> None:
    found = sweep(torch.empty(2, 4, 500, dtype=dtype))
    assert found.isfinite().all()
    assert found.abs().max() > 1000
    assert (found.abs() < 0.1).any(-1).all()
    assert not found[0, 0].equal(found[0, 1])
