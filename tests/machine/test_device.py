"""Devices without float64, decompositions or known random states, tried on a pretended one."""

from __future__ import annotations

import copy
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import celora
from celora import CELoraConfig, CELoraError
from celora.machine import device
from celora.machine.device import device_name
from celora.numerics import select
from celora.numerics.estimators import make_estimator
from celora.numerics.factor import svd_factor
from celora.numerics.head import score_tokens, through_the_head
from celora.runtime.attachment import require
from celora.runtime.fidelity import Fidelity
from patching import patch_all
from pretended import MPS, Pretended, pretended_mps
from small import MEMBERS, make_batch, make_model


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch):
    with pretended_mps(monkeypatch) as asked:
        yield asked


def moved(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(MPS)


def test_the_pretended_device_refuses_what_mps_refuses(mps: list[str]) -> None:
    x = moved(torch.randn(3, 3))
    assert isinstance(x, Pretended)
    assert x.device == MPS
    assert (x + 1).sum().item() == pytest.approx(float(x.cpu().sum()) + 9)
    with pytest.raises(TypeError, match="no float64"):
        x.double()
    with pytest.raises(TypeError, match="no float64"):
        torch.zeros(3, dtype=torch.float64, device=MPS)
    with pytest.raises(NotImplementedError):
        torch.linalg.eigh(x)
    with pytest.raises(RuntimeError, match="mps and on cpu"):
        x + torch.ones(3)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9999, 1 - 1e-6, 1.0])
def test_as_many_tokens_hold_a_share_as_on_the_cpu(share: float, mps: list[str]) -> None:
    squared = torch.rand(3000).pow(9)
    found = select.energy_count(moved(squared), share)
    assert found.device == MPS
    assert int(found) == int(select.energy_count(squared, share))


@pytest.mark.parametrize("n", [30, 50_000])
def test_draws_are_those_of_the_cpu(n: int, mps: list[str]) -> None:
    """Draws are computed on the CPU: float32 cannot tell the intervals of 50,000 words apart."""
    scores = torch.rand(n).pow(6)
    index, factors, p = select.drawn(scores, n // 3, seed=2, draw=5)
    found = select.drawn(moved(scores), n // 3, seed=2, draw=5)
    assert all(tensor.device == MPS for tensor in found)
    assert found[0].cpu().equal(index)
    assert found[1].cpu().equal(factors.float())
    assert found[2].cpu().equal(p.float())


@pytest.mark.parametrize("shape", [(12, 9), (200, 160)])  # one is decomposed exactly, one by a sketch
def test_factors(shape: tuple[int, int], mps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    W = torch.randn(shape)
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())  # both devices draw the same numbers
    expected = svd_factor(W, 4)
    found = svd_factor(moved(W), 4)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.device == MPS
        assert ours.cpu().equal(theirs)


@pytest.mark.parametrize("name", [name for name in MEMBERS if "int8" not in name])
def test_every_estimator_computes_there(name: str, mps: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = MEMBERS[name]
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    settings = {name: getattr(config, name) for name in ("keep_ratio", "selection", "factor")} | {"rank": config.rank}
    W, G, fresh = torch.randn(20, 12), torch.randn(30, 20), torch.randn(25, 20)
    found = []
    for where in (torch.device("cpu"), MPS):
        estimator = make_estimator(config.estimator, 20, 12, settings)
        estimator.device = where
        w, g = W.to(where), G.to(where)
        estimator.observe(g, w, g @ w)
        estimator.select()
        assert estimator.ready
        found.append(estimator.estimate(fresh.to(where), w))
        assert found[-1].device == where
    assert found[1].cpu().shape == (25, 12)
    # On an accelerator, tokens by energy keep the share of the latest refresh.
    if config.selection != "energy" or config.estimator != "tokens":
        torch.testing.assert_close(found[1].cpu(), found[0], rtol=1e-5, atol=1e-5)


def test_the_estimated_head(mps: list[str]) -> None:
    hidden, weight = torch.randn(2, 9, 16), torch.randn(40, 16)
    rows, targets = torch.arange(18), torch.randint(0, 40, (18,))
    found = []
    for where in (torch.device("cpu"), MPS):
        x = hidden.clone().to(where).requires_grad_()
        scores = score_tokens(x, rows.to(where), targets.to(where), weight.to(where), keep_ratio=0.3, seed=4)
        scores.log_probs.sum().backward()
        out = torch.empty(18, 16).to(where)
        through_the_head(torch.randn(18, 40, generator=torch.Generator().manual_seed(1)).to(where),
                         weight.to(where), targets.to(where), 0.2, out, 3)  # fmt: skip
        found.append((scores.log_probs.detach().cpu(), out.cpu()))
        assert x.grad is not None
        assert x.grad.device == where
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_fidelity_is_summed_in_float64(mps: list[str]) -> None:
    g, e = torch.randn(5000), torch.randn(5000)
    assert Fidelity.of([(moved(g), moved(e))]) == Fidelity.of([(g, e)])


def on_mps(model: PeftModel) -> PeftModel:
    """Do `model.to("mps")`. It has to make new parameters, because the tensors' class changes."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(moved(p.detach()), requires_grad=p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved(buffer)
    return model


def test_an_audit_there_is_the_cpu_s(mps: list[str]) -> None:
    config = CELoraConfig(keep_ratio=0.5, rank=0, labelled_head=True, head_keep_ratio=0.4)
    model, batch = make_model(), make_batch(1)
    elsewhere = on_mps(copy.deepcopy(model))
    reports = []
    for where in (model, elsewhere):
        celora.attach(where, config)
        reports.append(celora.audit(where, batch))
        celora.detach(where)
    assert reports[1].cosine < 1
    assert reports[1].cosine == pytest.approx(reports[0].cosine, abs=1e-5)
    assert reports[1].loss == pytest.approx(reports[0].loss, abs=1e-5)
    assert mps.count("get") == 1
    assert mps.count("set") == 2  # once before the second gradient, and once at the end


def test_training_there(mps: list[str]) -> None:
    model = on_mps(make_model())
    celora.attach(model, CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=2))
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(4):
        model(**{key: moved(value) for key, value in make_batch(step).items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    errors = require(model).relative_errors
    assert errors
    assert all(0 < error < 1 for error in errors.values())


def test_every_device_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda _: "Intel Arc")
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M2", raising=False)
    names = {kind: device_name(torch.device(kind)) for kind in ("cuda", "xpu", "mps")}
    assert names == {"cuda": "NVIDIA H100", "xpu": "Intel Arc", "mps": "Apple M2"}
    info = Path("/proc/cpuinfo")
    if info.exists() and "model name" in (text := info.read_text()):
        assert f": {device_name(torch.device('cpu')).partition(', family')[0]}\n" in text
    assert device_name(torch.device("cpu"))


def test_random_states_of_all_devices_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"xpu:0": 10, "xpu:1": 20}
    module = types.SimpleNamespace(
        get_rng_state=lambda place: states[str(place)],
        set_rng_state=lambda state, place: states.update({str(place): state}),
    )
    patch_all(monkeypatch, "celora.machine.device:backend", lambda place: module)
    where = [torch.device("cpu"), torch.device("xpu", 1), torch.device("xpu", 0), torch.device("xpu", 1)]
    cpu = torch.get_rng_state()
    with device.random_states(where) as rewind:
        first = torch.rand(2)
        states.update({"xpu:0": 11, "xpu:1": 21})
        rewind()
        assert states == {"xpu:0": 10, "xpu:1": 20}
        assert torch.rand(2).equal(first)
        states["xpu:1"] = 22
    assert states == {"xpu:0": 10, "xpu:1": 20}
    assert torch.get_rng_state().equal(cpu)


def test_a_random_state_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_all(monkeypatch, "celora.machine.device:backend", lambda place: types.SimpleNamespace())
    said = pytest.raises(CELoraError, match="cannot read the random state of 'xpu'")
    with said, device.random_states([torch.device("xpu")]):
        pass


def test_where_a_model_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: found is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: found)
    assert device.default_device() == torch.device("cpu")
    found = MPS
    assert device.default_device() == device.accelerator() == MPS
    assert device.exact_device(MPS) == device.exact_device(torch.device("xpu")) == torch.device("cpu")
    assert device.exact_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
