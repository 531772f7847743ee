"""Every row of the table of families is compared with Transformers' own models. A new family needs only a row."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import celora
from celora.kernels.c import library as kernels
from celora.modeling.families import ATTENTIONS, FAMILIES, Family, Gate, column, family_of
from celora.modeling.passes import known as passes
from celora.modeling.survey import survey
from celora.modeling.switch import Switch
from celora.numerics import passes as numerics
from decoders import PACKED, model_of
from labelled import gradients, ragged
from patching import patch_all
from tolerances import OF_GRADIENT

RECIPE = Path(__file__).parents[2] / "docs" / "develop" / "new-family.md"
DECODERS = [*PACKED, "gemma2", "cohere2"]  # their norms, gates and rotations are known


def inside(kind: str, ending: str) -> Iterator[tuple[nn.Module, type[Any]]]:
    """The modules of a small bfloat16 model of this family whose class name ends like this."""
    for module in model_of(kind).to(torch.bfloat16).modules():
        if type(module).__name__.endswith(ending):
            yield module, type(module)


def test_the_table_has_each_family_once() -> None:
    assert [family.name for family in FAMILIES.values()] == list(FAMILIES)
    assert all(set(family.packs_with) <= set(ATTENTIONS) for family in FAMILIES.values())
    assert family_of(AutoConfig.for_model("qwen3")) is FAMILIES["qwen3"]
    assert family_of(AutoConfig.for_model("gpt2")) is None
    assert family_of(None) is None


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind in CONFIG_MAPPING])
def test_its_configuration_has_what_the_row_names(kind: str) -> None:
    family, config = FAMILIES[kind], AutoConfig.for_model(kind).get_text_config()
    for name in filter(None, (family.scale, family.cap)):
        assert hasattr(config, name)
        assert name in column("scale") + column("cap")
    source = inspect.getsource(type(config))
    assert hasattr(config, family.window) or "window" not in source


@pytest.mark.parametrize("kind", DECODERS)
def test_norms(kind: str) -> None:
    """In bfloat16 the norm computes what the row says, bit for bit."""
    kept = FAMILIES[kind].norm
    norms = [module for module, _ in inside(kind, "RMSNorm")]
    assert bool(norms) is (kept is not None)
    for module in norms:
        assert kept is not None
        weight: Any = module.weight
        nn.init.normal_(weight)
        x = torch.randn(5, len(weight)).to(weight.dtype)
        eps: Any = getattr(module, "variance_epsilon", None) or module.eps
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        if kept.rounds:
            expected = (kept.offset + weight) * normed.to(x.dtype)
        else:
            expected = ((kept.offset + weight.float()) * normed).to(x.dtype)
        assert torch.equal(module(x), expected)


@pytest.mark.parametrize("kind", DECODERS)
def test_gates(kind: str) -> None:
    """A block is `down(silu(gate(x)) up(x))` if the row says so. Otherwise it has no such parts, or another gate."""
    row = FAMILIES[kind].gate
    for module, own in inside(kind, "MLP"):
        if "Sparse" in own.__name__:  # an expert, before version 5 of Transformers
            continue
        activation = type(getattr(module, Gate().activation, None)).__name__
        assert (row is not None) is (hasattr(module, Gate().gate) and activation in ("SiLU", "SiLUActivation"))
        if row is not None:
            x = torch.randn(5, 32).to(torch.bfloat16)
            gate, up, down = (getattr(module, name) for name in (row.gate, row.up, row.down))
            assert torch.equal(module(x), down(F.silu(gate(x)) * up(x)))


@pytest.mark.parametrize("kind", DECODERS)
def test_rotations(kind: str) -> None:
    """The function in the attention's own file turns by halves if the row says so."""
    name = FAMILIES[kind].rotation
    q, k, cosine, sine = (torch.randn(1, *heads, 3, 8) for heads in ((2,), (1,), (), ()))

    def turned(x: Tensor) -> Tensor:
        half = torch.cat([-x[..., 4:], x[..., :4]], -1)
        return x * cosine[:, None] + half * sine[:, None]

    for _, attention in inside(kind, "Attention"):
        function = inspect.unwrap(attention.forward).__globals__[name or "apply_rotary_pos_emb"]
        found = function(q, k, cosine, sine)
        assert all(torch.allclose(y, turned(x)) for y, x in zip(found, (q, k), strict=True)) is bool(name)


def test_a_family_without_a_row_trains_as_before() -> None:
    """Its padding stays. celora still tries the names of other families for what is done to its logits."""
    model, batch = model_of("gemma2"), ragged([11, 4, 7])
    loss, expected = gradients(model, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(FAMILIES, "gemma2")
        found = survey(model).language_model
        assert found is not None
        assert family_of(found.causal.config) is None
        assert "'gemma2'" in found.cannot_pack
        celora.attach(model, "exact")
        ours, gradient = gradients(model, batch)
        assert model(**batch).logits is None
    assert ours == pytest.approx(loss, rel=1e-6)
    assert (gradient - expected).norm() < OF_GRADIENT * expected.norm()


class Block(nn.Module):
    """A SwiGLU block whose parts have other names."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3, self.w2, self.act = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.w2(self.act(self.w1(x)) * self.w3(x))
        return found


def turn_by_halves(q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cosine[:, None] + torch.cat([-second, first], -1) * sine[:, None]

    return turned(q), turned(k)


class Attention(nn.Module):
    """An attention that turns queries by a function with another name."""

    def forward(self, q: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        return turn_by_halves(q, q, cosine, sine)[0]


@pytest.mark.skipif(kernels.library() is None, reason="no C compiler")
def test_other_names_are_found_once_a_row_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList([Block(), Attention()]).train()
    block, attention = model
    inputs = [(block, (torch.randn(3, 8),)), (attention, (torch.randn(2, 4, 3, 8), *torch.randn(2, 2, 3, 8)))]
    expected = [module(*given) for module, given in inputs]
    assert passes.known(block) == {}
    row = Family("toy", gate=Gate("w1", "w3", "w2", "act"), rotation=turn_by_halves.__name__)
    monkeypatch.setitem(FAMILIES, "toy", row)
    found = passes.known(model)
    assert {module: kind.name for module, kind in found.items()} == {block: "gates", attention: "rotations"}
    calls: list[str] = []
    for name in ("gated", "rotated"):
        before = getattr(numerics, name)

        def counted(*given, b=before, n=name, **how):
            calls.append(n)
            return b(*given, **how)

        patch_all(monkeypatch, f"celora.numerics.passes:{name}", counted)
    for module, kind in found.items():
        kind(Switch()).under(module)
    for (module, given), theirs in zip(inputs, expected, strict=True):
        torch.testing.assert_close(module(*given), theirs)
    assert calls == ["gated", "rotated", "rotated"]


def test_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/develop/new-family.md. Without its row, padding and the model's own loss stay."""
    blocks = re.findall(r"```python\n(.*?)```", RECIPE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.setitem(FAMILIES, "toy", Family("other"))  # the row is removed again after the test
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        exec(block, names)
    model, batch, theirs = names["model"], names["batch"], names["theirs"]
    celora.detach(model)
    del FAMILIES["toy"]
    report = celora.attach(model, "exact")
    assert "Padding stays: not known to be right for 'toy' models." in report.notes
    with pytest.warns(UserWarning, match="ToyForCausalLM does something to its logits that is not known"):
        output = model(**batch)
    assert output.logits is not None
    torch.testing.assert_close(output.loss, theirs)
