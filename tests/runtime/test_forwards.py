"""Which 8-bit forwards celora gives up for the layer's own, in one process and in several."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

import celora
from celora import CELoraConfig
from celora.runtime.attachment import require
from celora.settings.names import HEAD
from machine import refuses
from small import head_outlier, make_batch, make_model, outlier, train
from without import without

BOTH = CELoraConfig(estimator="int8", forward="int8", refresh_every=3, fused=True)
pytestmark = pytest.mark.skipif(refuses(), reason="no 8-bit products here, which is tested in test_products")


def test_a_layer_that_loses_too_much_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "onednn")
    model = make_model()
    outlier(model, 1e-4)
    celora.attach(model, BOTH)
    with pytest.warns(UserWarning, match="from step 4 on, the forward of .*gate_proj.* is exact: in 8 bits") as said:
        train(model, 7)
    assert sum("is exact: in 8 bits" in str(warning.message) for warning in said) == 1
    forwards = require(model).forwards
    names = {name for name in forwards if name.endswith(("layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"))}
    assert names <= forwards.made_exact
    layer = model.get_submodule(sorted(names)[0]).base_layer
    x = torch.randn(3, 48)
    assert layer(x).equal(nn.functional.linear(x, layer.weight, layer.bias))
    celora.save_state(model, tmp_path)
    errors = dict(forwards.errors)
    celora.attach(model, "off")
    celora.attach(model, BOTH)
    assert not require(model).forwards.made_exact
    celora.load_state(model, tmp_path)
    assert require(model).forwards.made_exact == forwards.made_exact
    assert require(model).forwards.errors == errors


def standing_still(model: PeftModel) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0)


HEAD_TOO = dataclasses.replace(BOTH, labelled_head=True, head_forward="int8")
HEAD_ALONE = CELoraConfig(estimator="dense", labelled_head=True, head_forward="int8", refresh_every=3)


def test_a_head_that_loses_too_much_goes_back(tmp_path: Path) -> None:
    """Its second step tells: by then the scales of its input have been learned, and they are not enough."""
    model = make_model()
    head_outlier(model, 1e-4)
    before = str(celora.attach(model, HEAD_ALONE))
    said_once = "from step 2 on, the forward of head is exact: in 8 bits .* off by 9.%"
    with pytest.warns(UserWarning, match=said_once) as said:
        train(model, 7)
    assert sum("is exact: in 8 bits" in str(warning.message) for warning in said) == 1
    forwards = require(model).forwards
    assert forwards.made_exact == {HEAD}
    assert not forwards[HEAD].product.holds_copy
    assert str(celora.attach(model, HEAD_ALONE)).startswith(f"{before}\n1 of 1 forwards in 8 bits are exact again")
    celora.save_state(model, tmp_path)
    errors, loss = dict(forwards.errors), model(**make_batch(0)).loss
    for config in ("off", dataclasses.replace(HEAD_ALONE, head_forward="exact")):
        celora.attach(model, config)
    assert model(**make_batch(0)).loss == loss
    celora.attach(model, HEAD_ALONE)
    assert not require(model).forwards.made_exact
    celora.load_state(model, tmp_path)
    assert require(model).forwards.made_exact == {HEAD}
    assert require(model).forwards.errors == errors


def test_the_head_learns_the_scales_of_its_input(tmp_path: Path) -> None:
    """With weights that are as many times smaller, a large feature is rounded like any other."""
    model, like_any = make_model(), make_model()
    head_outlier(model, 60)
    found = []
    for each in (like_any, model):
        celora.attach(each, HEAD_TOO)
        for step in range(2):
            train(each, 1, first=step, optimizer=standing_still(each))
            found.append(require(each).forwards.errors[HEAD])
    assert found[2] > 5 * found[0]
    assert found[3] == pytest.approx(found[1], rel=0.1)
    forwards = require(model).forwards
    levels = forwards[HEAD].product.levels
    celora.save_state(model, tmp_path)
    celora.attach(model, HEAD_TOO)
    celora.load_state(model, tmp_path)
    assert require(model).forwards[HEAD].product.levels.equal(levels)


def test_only_training_is_compared() -> None:
    """An evaluation must not decide, nor teach scales, although TRL's has 8-bit logits. Few steps cost more."""
    model = make_model()
    pytest.importorskip("trl.trainer.utils").add_fused_lm_head(model.base_model.model)
    celora.attach(model, dataclasses.replace(HEAD_ALONE, refresh_every=20))
    head = require(model).forward.eight_bit
    with torch.no_grad():
        found = [each(**make_batch(0), fused_lm_head=True).log_probs for each in (model.train(), model.eval())]
        with celora.original_base(model):
            assert not model(**make_batch(0), fused_lm_head=True).log_probs.equal(found[1])
    assert head.error.take_error() is None
    assert head.product.take_sizes() is None
    watched = []
    train(model, 22, optimizer=standing_still(model), between=lambda: watched.append(head.watches))
    assert [step for step, watches in enumerate(watched, 1) if watches] == [*range(1, 10), 20]


def test_large_features_are_scaled_down_once_they_were_seen(tmp_path: Path) -> None:
    """Language models have such features: up to a hundred times as large as the others."""
    model = make_model()
    outlier(model, 60)
    celora.attach(model, BOTH)
    forwards, errors = require(model).forwards, []
    for _ in range(2):
        train(model, 3, optimizer=standing_still(model))
        errors.append(dict(forwards.errors))
    names = {name for name in forwards if name.endswith(("layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"))}
    for name in names:
        assert errors[1][name] < 0.4 * errors[0][name]
    # With weights that are as many times smaller, they are rounded like any other feature.
    without = make_model()
    celora.attach(without, BOTH)
    for _ in range(2):
        train(without, 3, optimizer=standing_still(without))
    assert errors[1] == pytest.approx(require(without).forwards.errors, rel=0.1)
    gate, up = (forwards[name].graft.estimator.product for name in sorted(names))
    assert gate._packed.input_scale is up._packed.input_scale  # so their input is quantised only once
    celora.save_state(model, tmp_path)
    levels = {name: forward.graft.estimator.product.levels for name, forward in forwards.items()}
    celora.attach(model, BOTH)
    celora.load_state(model, tmp_path)
    for name, forward in require(model).forwards.items():
        assert forward.graft.estimator.product.levels.equal(levels[name])


def test_the_first_steps_also_measure_each_layer_with_its_scales() -> None:
    """A short run would else never know what its layers lose."""
    model = make_model()
    outlier(model, 60)
    celora.attach(model, dataclasses.replace(BOTH, refresh_every=200, spread=True))
    attachment, errors = require(model), []
    for _ in range(2):
        train(model, 10, optimizer=standing_still(model))
        errors.append(dict(attachment.forwards.errors))
    assert attachment.first_steps == 20
    assert errors[1].keys() == errors[0].keys() == attachment.grafts.keys()
    for name in ("gate_proj", "up_proj"):
        (layer,) = (n for n in attachment.grafts if n.endswith(f"layers.1.mlp.{name}"))
        assert errors[1][layer] < 0.4 * errors[0][layer]


@pytest.mark.parametrize("tau", [3, 20])
def test_layers_share_the_scales_of_their_input_if_refreshes_take_turns(tau: int) -> None:
    model = make_model()
    celora.attach(model, dataclasses.replace(BOTH, refresh_every=tau, spread=True))
    train(model, 10)
    scales: dict[str, list[torch.Tensor]] = {}
    for name, forward in require(model).forwards.items():
        product = forward.graft.estimator.product
        if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            scales.setdefault(name.rpartition(".")[0], []).append(product._input_scale(torch.device("cpu")))
    assert [len(shared) for shared in scales.values()] == [3, 2, 3, 2]
    for shared in scales.values():
        assert all(scale is not None and scale is shared[0] for scale in shared)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_during_a_refresh_knows_what_was_seen(copied: Callable[[PeftModel], PeftModel]) -> None:
    """It also has the errors, which are those without scales: nothing may be given up for them."""
    model = make_model()
    outlier(model, 1e4)
    celora.attach(model, BOTH)
    model.train()(**make_batch(0)).loss.backward()
    other = copied(model)
    for changed in (model, other):
        for parameter in changed.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        standing_still(changed).step()
    forwards, expected = require(other).forwards, require(model).forwards
    assert not forwards.made_exact
    for name, forward in expected.items():
        assert forwards[name].graft.estimator.product.levels.equal(forward.graft.estimator.product.levels)


def test_an_evaluation_in_inference_mode_may_follow_a_refresh() -> None:
    """A refresh ends with new scales of inputs. The evaluation is the first to need them, and training saves them."""
    model = make_model(seed=17)  # scales that no other test has made
    celora.attach(model, BOTH)
    optimizer = train(model, 1)
    with torch.inference_mode():
        model.eval()(**make_batch(0))
    train(model.train(), 2, first=1, optimizer=optimizer)
    assert all(forward.graft.estimator.product.levels is not None for forward in require(model).forwards.values())


def test_processes_agree_on_who_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process has seen a large error, so all processes compute that layer exactly."""
    model = make_model()
    celora.attach(model, BOTH)
    train(model, 1)
    forwards = require(model).forwards
    name = next(iter(forwards))
    monkeypatch.setattr("celora.runtime.agreement.in_company", lambda: True)
    told_by_another = [[200_000], *([-1] for _ in range(13))]
    monkeypatch.setattr("celora.runtime.agreement.largest_of_all", lambda told, device: told_by_another)
    with pytest.warns(UserWarning, match="was off by 20%, and less than 10% is accepted"):
        forwards.end_refresh(1, torch.device("cpu"))
    assert forwards.made_exact == {name}


def test_processes_agree_on_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    celora.attach(model, HEAD_TOO)
    train(model, 2)
    told = [[200_000] if name == HEAD else [-1] for name in require(model).forwards]
    monkeypatch.setattr("celora.runtime.agreement.in_company", lambda: True)
    monkeypatch.setattr("celora.runtime.agreement.largest_of_all", lambda *_: told)
    with pytest.warns(UserWarning, match="the forward of head is exact"):
        require(model).forwards.end_refresh(2, torch.device("cpu"))
    assert require(model).forwards.made_exact == {HEAD}
    celora.detach(model)


def test_a_head_that_only_another_process_has_seen_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have no labelled token in a step. It knows by itself how many numbers the others send."""
    model = make_model()
    celora.attach(model, HEAD_ALONE)
    forwards = require(model).forwards
    told_by_another = iter([[[1]], [list(range(2 * 48))]])
    monkeypatch.setattr("celora.runtime.forwards.in_company", lambda: True)
    monkeypatch.setattr("celora.runtime.forwards.largest_of_all", lambda told, device: next(told_by_another))
    forwards.end_refresh(1, torch.device("cpu"))
    assert forwards[HEAD].product.levels is not None


@pytest.mark.parametrize("own_bytes", [False, True])
def test_processes_tell_only_the_sizes_that_somebody_has_seen(monkeypatch: pytest.MonkeyPatch, own_bytes: bool) -> None:
    """What nobody has seen would send two numbers for each input feature at each refresh."""
    model, asked = make_model(), list[int]()
    if own_bytes:
        celora.quantise_base(model)
    celora.attach(model, BOTH)
    forwards = require(model).forwards
    model.train()(**make_batch(0)).loss.backward()

    def alone(told: list[list[int]], device: torch.device) -> list[list[int]]:
        asked.append(sum(map(len, told)))
        return told

    monkeypatch.setattr("celora.runtime.forwards.in_company", lambda: True)
    monkeypatch.setattr("celora.runtime.forwards.largest_of_all", alone)
    forwards.end_refresh(1, torch.device("cpu"))
    known = sum(forward.graft.estimator.product.levels is not None for forward in forwards.values())
    features = sum(forward.graft.estimator.in_features for forward in forwards.values())
    assert (known, asked) == (14, [14, 2 * features])


def test_a_layer_that_only_another_process_has_seen_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    celora.attach(model, BOTH)
    forwards = require(model).forwards
    features = sum(forward.graft.estimator.in_features for forward in forwards.values())
    told_by_another = iter([[[1] * 14], [list(range(2 * features))]])
    monkeypatch.setattr("celora.runtime.forwards.in_company", lambda: True)
    monkeypatch.setattr("celora.runtime.forwards.largest_of_all", lambda told, device: next(told_by_another))
    forwards.end_refresh(1, torch.device("cpu"))
    assert all(forward.graft.estimator.product.levels is not None for forward in forwards.values())
