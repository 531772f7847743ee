"""Every cell of docs/use/compatibility.md: a PEFT variant or a model, and one thing that must work with it."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import peft.tuners.lora.layer
import pytest
import torch
from torch import Tensor, nn

import celora
from celora import CELoraConfig
from celora.modeling.survey import survey
from celora.modeling.switch import Mode
from celora.runtime.attachment import find, require
from celora.settings.presets import PRESETS
from forked import run, script
from machine import refuses
from small import MEMBERS, adapter
from variants import COLUMNS, MODELS, PAGE, VARIANTS, YES, Variant, page
from versions import before

HALF = CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=3)
BOTH_WAYS = MEMBERS["int8 both ways"]
# Every layer has a graft, and only zeros are left out.
LOSSLESS = CELoraConfig(estimator="tokens", keep_ratio=1.0, rank=0, selection="energy")


@pytest.fixture(autouse=True)
def _loftq_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT quantises for LoftQ on a GPU only.

    Here, each row is rounded to 4 bits and the rest is factored, as in LoftQ.
    """

    def loftq_init(weight: Tensor, num_bits: int, reduced_rank: int, num_iter: int = 1) -> tuple[Tensor, ...]:
        step = weight.abs().amax(1, keepdim=True) / 2 ** (num_bits - 1)
        quantised = (weight / step).round() * step
        U, S, V = torch.linalg.svd(weight - quantised, full_matrices=False)
        root = S[:reduced_rank].sqrt()
        return quantised, root[:, None] * V[:reduced_rank], U[:, :reduced_rank] * root

    if not torch.cuda.is_available():
        for module in (peft.utils.loftq_utils, peft.tuners.lora.layer):  # the second since PEFT 0.19
            monkeypatch.setattr(module, "loftq_init", loftq_init, raising=module is peft.utils.loftq_utils)


def _gradient(variant: Variant, model: nn.Module, seed: int = 50) -> Tensor:
    model.zero_grad()
    torch.manual_seed(seed)
    model(**variant.batch(seed)).loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
    model.zero_grad()
    return torch.cat(grads)


@torch.no_grad()
def _output(variant: Variant, model: nn.Module, *, as_trained: bool = False) -> Tensor:
    """The logits of the model's own forward, or of the one that it trains with."""
    mode, attachment = model.training, find(model)
    with nullcontext() if attachment is None or as_trained else attachment.switch.own_forwards():
        logits: Tensor = model.eval()(**variant.batch(60)).logits
    model.train(mode)
    return logits


def estimated(variant: Variant, folder: Path, config: CELoraConfig) -> str:
    model = variant.make()
    exact = copy.deepcopy(model)
    report = celora.attach(model, config)
    loss = variant.fit(model, 7)
    assert torch.isfinite(torch.tensor(loss))
    attachment = require(model)
    if not attachment.grafts:
        (reason,) = set(report.skipped.values())
        return reason
    assert attachment.refreshes == 3
    active = [name for name, graft in attachment.grafts.items() if graft.estimator.ready and graft.observed]
    assert len(active) >= len(attachment.grafts) / 2
    if config.forward == "int8":
        assert attachment.forwards.keys() == attachment.grafts.keys()
        assert not attachment.forwards.made_exact
    assert set(attachment.relative_errors) == set(active)
    attachment.clock.advance()  # leave the refresh of step 6
    assert {attachment.grafts[name].mode for name in active} == {Mode.ESTIMATE}
    variant.fit(exact, 7)
    found = adapter(model)
    assert any(not value.equal(found[name]) for name, value in adapter(exact).items())
    return YES


def same_gradient(variant: Variant, folder: Path, config: CELoraConfig) -> str:
    plain = variant.make()
    variant.fit(plain, 2)
    expected = _gradient(variant, plain)
    # Dropout draws other numbers if padding is left out.
    drops = any(isinstance(module, nn.Dropout) and module.p for module in plain.modules())
    for lossless in (LOSSLESS, dataclasses.replace(PRESETS["exact"], padding_free=not drops)):
        model = copy.deepcopy(plain)
        celora.attach(model, lossless)
        require(model).clock.advance()
        found = [_gradient(variant, model) for _ in range(2)][-1]  # the second call is without the checks of the first
        assert (found - expected).norm() < 3e-6 * expected.norm(), lossless
    return YES


def fused(variant: Variant, folder: Path, config: CELoraConfig) -> str:
    layers = survey(variant.make()).layers.values()
    apart = [layer.cannot_fuse for layer in layers if isinstance(layer.base, nn.Linear) and layer.cannot_fuse]
    return "PEFT's path" if apart else YES


def reloads(variant: Variant, folder: Path, config: CELoraConfig) -> str:
    model = variant.make()
    celora.attach(model, config)
    variant.fit(model, 5)
    model.save_pretrained(folder)
    for name in (file for file in folder.rglob("*") if file.suffix == ".json"):
        assert "celora" not in name.read_text(encoding="utf-8")
    stock = variant.load(variant.base(), folder)
    torch.testing.assert_close(_output(variant, stock), _output(variant, model), rtol=0, atol=1e-5)
    return YES


def merges(variant: Variant, folder: Path, config: CELoraConfig) -> str:
    model = variant.make()
    celora.attach(model, config)
    variant.fit(model, 2)
    before, trained = (_output(variant, model, as_trained=both) for both in (False, True))
    assert trained.equal(before) is (config.forward == "exact")
    plain = copy.deepcopy(model)
    celora.detach(plain)
    try:
        plain.merge_adapter()
    except NotImplementedError:
        return "not in PEFT either"
    model.merge_adapter()
    merged, expected = _output(variant, model, as_trained=True), _output(variant, plain)
    torch.testing.assert_close(merged, expected, rtol=0, atol=0)
    if (merged - before).abs().max() > 1e-4:
        return "not in PEFT either"
    model.unmerge_adapter()
    torch.testing.assert_close(_output(variant, model), before, rtol=0, atol=1e-4)
    # The weights have changed by their rounding, and may fall on other 8-bit numbers: before and after are as far from
    # the model's own output.
    allowed = 1e-4 + 2 * float((trained - before).abs().max())
    torch.testing.assert_close(_output(variant, model, as_trained=True), trained, rtol=0, atol=allowed)
    attachment = require(model)
    modes = {name: graft.mode for name, graft in attachment.grafts.items() if graft.estimator.ready}
    assert set(modes.values()) <= {Mode.ESTIMATE}
    variant.fit(model, 3, first=2)
    assert attachment.refreshes == 2
    assert all(graft.estimator.ready for name, graft in attachment.grafts.items() if name in modes)
    return YES


def copies(variant: Variant, folder: Path, config: CELoraConfig) -> str:
    model = variant.make()
    celora.attach(model, config)
    variant.fit(model, 2)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [model, copy.deepcopy(model), torch.load(buffer, weights_only=False)]
    for twin in twins:
        variant.fit(twin, 3, first=2)
        assert (require(twin).clock.step, require(twin).refreshes) == (5, 2)
        found = adapter(twin)
        for name, value in adapter(model).items():
            assert value.equal(found[name]), name
    assert len({id(require(twin)) for twin in twins}) == 3
    return YES


def detaches(variant: Variant, folder: Path, config: CELoraConfig) -> str:
    plain, touched = variant.make(), variant.make()
    celora.attach(touched, config)
    celora.detach(touched)
    for model in (plain, touched):
        variant.fit(model, 2)
    assert list(plain.state_dict()) == list(touched.state_dict())
    found = adapter(touched)
    for name, value in adapter(plain).items():
        assert value.equal(found[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in touched.modules() if isinstance(m, nn.Linear))
    return YES


CHECKS: dict[str, Callable[[Variant, Path, CELoraConfig], str]] = {
    "estimated": estimated,
    "same gradient": same_gradient,
    "fused": fused,
    "reloads": reloads,
    "merges": merges,
    "copies": copies,
    "detaches": detaches,
}


def loads_again(variant: Variant) -> bool:
    """Whether this version of PEFT saves its adapter, and loads what it has saved."""
    return variant.name not in ("LoftQ", '`bias="lora_only"`') or not before("peft", "0.21")


CELLS = [
    pytest.param(variant, column, id=f"{variant.name}-{column}")
    for variant in (*VARIANTS, *MODELS)
    for column in COLUMNS
    if column != "reloads" or loads_again(variant)
]


# PEFT's own warnings about these variants.
PEFTS_OWN = (
    "ignore:lora with eva initialization used with low_cpu_mem_usage=False",
    "ignore:The following rank_pattern keys did not match:RuntimeWarning",  # AdaLoRA's
    "ignore:Unmerge result can be inaccurate for .IA",
    "ignore:Already found a `peft_config` attribute in the model",  # two kinds of adapters
    "ignore:.*LoRA tensor.* have invalid shape",  # peft 0.21 says so about every `lora_B.bias`
    "ignore:celora. no layer can be estimated",
)


@pytest.mark.filterwarnings(*PEFTS_OWN)
@pytest.mark.parametrize(("variant", "column"), CELLS)
def test_cell(variant: Variant, column: str, tmp_path: Path) -> None:
    assert CHECKS[column](variant, tmp_path, HALF) == variant.limits.get(column, YES)


IN_8_BITS = (
    "LoRA", "PiSSA", "DoRA", "`lora_bias=True`", '`bias="lora_only"`', "`modules_to_save`",
    "encoder (BERT, classification)", "sequence to sequence (T5)",
)  # fmt: skip
CELLS_IN_8_BITS = [
    cell for cell in CELLS if cell.values[0].name in IN_8_BITS and cell.values[1] not in ("same gradient", "fused")
]


@pytest.mark.skipif(refuses(), reason="no 8-bit products here")
@pytest.mark.filterwarnings(*PEFTS_OWN)
@pytest.mark.parametrize(("variant", "column"), CELLS_IN_8_BITS)
def test_cell_with_8_bits_both_ways(variant: Variant, column: str, tmp_path: Path) -> None:
    assert CHECKS[column](variant, tmp_path, BOTH_WAYS) == variant.limits.get(column, YES)


# Before stock PEFT loads LoftQ's adapter, it makes it again. Without a GPU it cannot do that.
STOCK = [variant for variant in (*VARIANTS, *MODELS) if variant.name != "LoftQ" or torch.cuda.is_available()]
STOCK = [variant for variant in STOCK if loads_again(variant)]
# PEFT before 0.21 warns of a tied head in these adapters.
TIED = ("`modules_to_save`",) if before("peft", "0.21") else ()


@pytest.mark.filterwarnings(*PEFTS_OWN)
def test_adapters_load_where_celora_never_was(tmp_path: Path) -> None:
    """Stock PEFT, in a process without celora, gives the same outputs, and the same warnings as for its own adapter."""
    expected = {}
    for i, variant in enumerate(STOCK):
        folder = tmp_path / f"{i:02}"
        variant.base().save_pretrained(folder / "base")
        torch.save(variant.batch(60), tmp_path / f"{i:02}" / "batch.pt")
        for kind in ("celora", "plain"):
            model = variant.make()
            if kind == "celora":
                celora.attach(model, HALF)
            variant.fit(model, 3)
            model.save_pretrained(folder / kind)
            expected[folder, kind] = _output(variant, model)
        assert sorted(path.name for path in (folder / "celora").rglob("*")) == sorted(
            path.name for path in (folder / "plain").rglob("*")
        )
    done = run(script, Path(__file__).parents[1] / "helpers" / "stock_load.py", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for i, variant in enumerate(STOCK):
        loaded = torch.load(tmp_path / f"{i:02}" / "loaded.pt", weights_only=True)
        assert loaded["celora"]["said"] == loaded["plain"]["said"], variant.name
        silent = variant.name not in ("EVA", "AdaLoRA", "`lora_bias=True`", "IA3 beside LoRA", *TIED)
        assert not (silent and loaded["celora"]["said"]), (variant.name, loaded["celora"]["said"])
        for kind in ("celora", "plain"):
            wanted = expected[tmp_path / f"{i:02}", kind]
            torch.testing.assert_close(loaded[kind]["logits"], wanted, rtol=0, atol=1e-5, msg=variant.name)


def test_the_page_is_made_of_the_table_that_is_tested() -> None:
    assert set(CHECKS) == set(COLUMNS)
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/helpers/variants.py"
