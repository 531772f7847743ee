"""A plan as a file: saved, read back, carried out, and refused for another model or device."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import celora
from celora import CELoraConfig, CELoraError, Plan
from celora.machine.device import device_name
from celora.numerics.estimators import estimator_class
from celora.planning.plan import Candidate, PlannedLayer, label
from celora.settings.config import LayerConfig
from celora.settings.names import HEAD
from celora.settings.presets import PRESETS
from machine import refuses
from patching import patch_all
from small import make_model

LAYER = "base_model.model.model.layers.1.mlp.up_proj"
TOKENS = LayerConfig("tokens", keep_ratio=0.97, rank=0, selection="energy", precision="int8", weight_copy=False)


def possible() -> tuple[LayerConfig, LayerConfig]:
    """A whole product and a product with some tokens: in 8 bits, unless this machine refuses them."""
    if refuses() or refuses(copy=False):
        return LayerConfig("tokens", keep_ratio=0.9, rank=0), dataclasses.replace(TOKENS, precision="native")
    return LayerConfig("int8", rank=0), TOKENS


def make(model: PeftModel, settings: tuple[LayerConfig, LayerConfig] | None = None, **changes: Any) -> Plan:
    whole, part = settings or possible()
    candidates = (
        Candidate(LayerConfig("dense"), 2.0, 0.0),
        Candidate(whole, 1.0, 0.01, 80 * 48),
        Candidate(part, 0.5, 0.2),
    )
    layers = (
        PlannedLayer(LAYER, 80, 48, 0.5, candidates, 2),
        PlannedLayer(LAYER.replace("1", "0"), 80, 48, 0.5, candidates, 1),
        PlannedLayer(LAYER.replace("up_proj", "gate_proj"), 80, 48, 0.5, candidates, 0),
    )
    plan = Plan(
        layers, 0.98, 0.985, 0.981, 0.58, 0.6, 33, "float32", celora.machine.device.measured_on(_device(model)),
        torch.get_num_threads(), "2", 9999,
    )  # fmt: skip
    return dataclasses.replace(plan, **changes)


def _device(model: PeftModel) -> Any:
    return next(model.parameters()).device


def test_a_saved_plan_is_read_back_whole(model: PeftModel, tmp_path: Path) -> None:
    plan = make(model)
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == Plan.load(tmp_path / "celora_plan.json") == plan
    assert json.loads((tmp_path / "celora_plan.json").read_text())["version"] == 1


def test_a_plan_in_the_format_of_its_version_is_read_and_written_alike() -> None:
    document = {
        "version": 1, "fidelity": 0.98, "predicted_cosine": 0.985, "audited_cosine": 0.981, "predicted_time": 0.58,
        "audited_time": 0.6, "tokens": 33, "dtype": "float32", "device": "Abacus", "threads": 2, "torch": "2.13.0",
        "memory_limit": 9999, "audited_batches": 8, "loss_shift": 0.0,
        "settings": [
            {"estimator": "dense"},
            {"estimator": "tokens", "keep_ratio": 0.97, "rank": 0, "selection": "energy"},
            {"estimator": "tokens", "keep_ratio": 0.9, "rank": 0, "selection": "energy", "precision": "int8",
             "weight_copy": False},
            {"estimator": "columns", "rank": 0, "precision": "int8"},
            {"estimator": "int8", "rank": 0},
            {"estimator": "columns", "keep_ratio": 0.1, "rank": 0},
        ],
        "layers": [
            {"name": LAYER, "out_features": 80, "in_features": 48, "influence": 0.5, "chosen": 4,
             "candidates": [[0, 2.0, 0.0, 0], [1, 1.5, 0.2, 0], [2, 1.0, 0.3, 0], [3, 0.9, 0.4, 9600],
                            [4, 0.8, 0.01, 3840]]},
        ],
        "head": {"name": HEAD, "out_features": 61, "in_features": 48, "influence": 1.0, "chosen": 1,
                 "candidates": [[0, 8.0, 0.0, 0], [5, 1.0, 0.02, 0]]},
    }  # fmt: skip
    plan = Plan.from_dict(document)
    assert plan.layers[0].choice.setting == LayerConfig("int8", rank=0)
    assert plan.config().head_keep_ratio == 0.1
    assert plan.to_dict() == document


def test_attaching_a_plan_gives_each_layer_its_estimator(model: PeftModel) -> None:
    plan = make(model)
    report = celora.attach(model, plan)
    assert set(report.estimated) == {layer.name for layer in plan.layers[:2]}
    assert report.estimated[LAYER].label == ("tokens (energy) x int8" if possible()[1] == TOKENS else "tokens (energy)")
    assert plan.memory == 80 * 48
    frame = CELoraConfig(estimator="dense", overrides={"up_proj": {"estimator": "dense"}})
    with pytest.warns(UserWarning, match="no layer can be estimated"):
        assert not celora.attach(model, plan.config(frame)).estimated  # the user's own overrides come first


def test_a_plan_is_carried_out_as_it_is_whatever_the_frame_estimates(model: PeftModel) -> None:
    """The frame's own setting is for layers that are not in the plan. Planned layers that are exact stay exact."""
    plan = make(model)
    for frame in (PRESETS["fast"], PRESETS["paper"], CELoraConfig(keep_ratio=0.9, rank=2)):
        config = plan.config(dataclasses.replace(frame, overrides={}))
        for layer in plan.layers:
            planned, found = layer.choice.setting, config.for_layer(layer.name)
            assert found.estimator == planned.estimator
            if planned.estimator != "dense":
                assert dataclasses.replace(found, **_unused(planned)) == planned
        assert config.for_layer("another").estimator == frame.estimator


def test_how_inputs_are_saved_is_the_frames_choice_unless_the_plan_says(model: PeftModel) -> None:
    frame = dataclasses.replace(PRESETS["auto"], saved_input="int8")
    plan, wanted = make(model), LayerConfig("tokens", keep_ratio=0.9, rank=0, saved_input="native")
    assert {plan.config(frame).for_layer(layer.name).saved_input for layer in plan.layers} == {"int8"}
    assert {layer.saved_input for layer in celora.attach(model, plan.config(frame)).layers} == {"int8"}
    says = make(model, (wanted, dataclasses.replace(wanted, saved_input="int8")))
    assert Plan.from_dict(says.to_dict()) == says
    config = says.config(frame)
    assert [config.for_layer(layer.name).saved_input for layer in says.layers] == ["int8", "native", "int8"]
    assert label(wanted) == "tokens 0.9"  # as the exact forward multiplies it
    assert label(says.layers[0].choice.setting) == "tokens 0.9, input saved in 8 bits"
    both = dataclasses.replace(wanted, forward="int8", precision="int8")
    assert label(both) == "tokens 0.9 x int8, forward too, input saved in its own dtype"


def _unused(setting: LayerConfig) -> dict[str, Any]:
    """The fields that this estimator does not use."""
    used = {"estimator", *estimator_class(setting.estimator).uses}
    return {name: value for name, value in dataclasses.asdict(setting).items() if name not in used}


def test_a_layer_whose_name_ends_like_anothers_has_its_own_setting(model: PeftModel) -> None:
    """Layers of a module without PEFT's wrapper may be called `proj` and `vision.proj`."""
    exact, whole = (Candidate(LayerConfig("dense"), 2.0, 0.0), Candidate(LayerConfig("columns", rank=0), 1.0, 0.1))
    layers = [PlannedLayer(name, 8, 8, 0.5, (exact, whole), i) for i, name in enumerate(("vision.proj", "proj"))]
    config = make(model, layers=tuple(layers)).config()
    assert [config.for_layer(layer.name).estimator for layer in layers] == ["dense", "columns"]


def test_the_device_is_that_of_the_planned_layers(model: PeftModel) -> None:
    """Embeddings may be offloaded to another device than the layers."""
    plan = make(model)
    embedding = model.get_input_embeddings()
    embedding.weight = torch.nn.Parameter(embedding.weight.to("meta"), requires_grad=False)
    plan.check(model)


def test_the_head_is_part_of_a_plan(model: PeftModel, tmp_path: Path) -> None:
    share = LayerConfig("columns", keep_ratio=0.1, rank=0)
    candidates = (Candidate(LayerConfig("dense"), 8.0, 0.0), Candidate(share, 1.0, 0.02))
    plan = make(model, head=PlannedLayer(HEAD, 61, 48, 1.0, candidates, 1))
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    assert re.search(r"head +x1 +61 x 48 +columns 0.1 +0.12 +0.020", str(plan))
    assert plan.config().head_keep_ratio == 0.1
    report = celora.attach(model, plan)
    assert any("its gradient through 0.1 of the words" in note for note in report.notes)
    # Not if it is left exact, if the user has set another share, or if the loss is the model's own.
    assert plan.config(PRESETS["auto"], ["head_keep_ratio"]).head_keep_ratio == 1
    exact = dataclasses.replace(plan, head=dataclasses.replace(plan.head, chosen=0))
    assert exact.config().head_keep_ratio == 1
    assert plan.config(CELoraConfig(labelled_head=True, head_keep_ratio=0.5)).head_keep_ratio == 0.5
    assert plan.config(CELoraConfig()).head_keep_ratio == 1


def test_printed_it_is_a_table(model: PeftModel) -> None:
    text = str(make(model, (LayerConfig("int8", rank=0), TOKENS)))
    assert "tokens energy 0.97 x int8 (no copy)  0.25" in text
    assert "cosine 0.9810 audited, 0.9850 predicted, 0.98 asked for" in text
    assert "Made for 33 tokens" in text
    assert label(LayerConfig("columns", keep_ratio=0.5)) == "columns 0.5"


def test_a_plan_for_something_else_is_refused(model: PeftModel) -> None:
    with pytest.raises(CELoraError, match="measured on 'Abacus' and this is"):
        celora.attach(model, make(model, device="Abacus"))
    with pytest.raises(CELoraError, match="measured with 77 threads and torch has"):
        celora.attach(model, make(model, threads=77))
    strange = dataclasses.replace(make(model).layers[0], name="model.layers.7.up_proj")
    with pytest.raises(CELoraError, match="there is no adapted layer"):
        celora.attach(model, make(model, layers=(strange,)))
    larger = dataclasses.replace(make(model).layers[0], out_features=160)
    with pytest.raises(CELoraError, match="is 80 x 48 here, 160 x 48 in the plan"):
        celora.attach(model, make(model, layers=(larger,)))
    words = dataclasses.replace(larger, name=HEAD, out_features=128_000)
    with pytest.raises(CELoraError, match="'head' is 61 x 48 here, 128000 x 48 in the plan"):
        celora.attach(model, make(model, head=words))
    assert celora.attach(make_model(), make(model)).estimated


def test_a_plan_made_with_amx_is_not_one_without(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_all(monkeypatch, "celora.machine.cpu:matrix_instructions", lambda: True)
    with_amx = make(model)
    patch_all(monkeypatch, "celora.machine.cpu:matrix_instructions", lambda: False)
    assert not make(model).elsewhere(_device(model))
    with pytest.raises(CELoraError, match=r"measured on '.* with AMX' and this is"):
        celora.attach(model, with_amx)


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


@pytest.mark.parametrize(
    ("changes", "said"), [({}, False), ({"tokens": 60}, False), ({"tokens": 70}, True), ({"dtype": "float16"}, True)]
)
def test_batches_of_another_kind_are_noticed_in_training(
    model: PeftModel, batch: dict[str, torch.Tensor], changes: dict[str, Any], said: bool
) -> None:
    celora.attach(model, make(model, **changes))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(12):
            model(**batch).loss.backward()
            optimizer.step()
    told = [str(w.message) for w in caught if "the plan was measured with" in str(w.message)]
    assert len(told) == said, caught
    assert all("and training has up to 30 of float32. Make a new plan." in text for text in told)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "plan of version 2; this celora reads version 1"),
        (lambda d: d.update(fidelty=1), "unknown entry of a plan 'fidelty'; did you mean 'fidelity'"),
        (lambda d: d.pop("layers"), "not a whole plan: KeyError"),
        (lambda d: d["layers"][0].update(chosen=3), "not a whole plan: IndexError: position 3 of 3"),
        (lambda d: d["layers"][0].update(chosen=-1), "position -1"),
        (lambda d: d["settings"][1].update(estimator="int9"), "unknown estimator 'int9'"),
        (lambda d: d["settings"][1].update(keep=1), "not a whole plan: TypeError"),
        (lambda d: d.update(tokens="many"), "not a whole plan: ValueError"),
        (lambda d: d["layers"].append(7), "not a whole plan: TypeError"),
        (lambda d: d.update(fidelity=1e308), "fidelity=1e[+]308, which nobody can have measured"),
        (lambda d: d.update(audited_cosine=-1.5), "audited_cosine=-1.5"),
        (lambda d: d.update(predicted_time=math.inf), "predicted_time=inf"),
        (lambda d: d["layers"][0].update(influence=math.nan), "influence=nan"),
        (lambda d: d["layers"][0]["candidates"][1].__setitem__(1, -1), "time_ms=-1"),
        (lambda d: d["layers"][0]["candidates"][1].__setitem__(2, math.nan), "relative_error=nan"),
        (lambda d: d["layers"][0]["candidates"][1].__setitem__(3, -5), "memory=-5"),
    ],
)
def test_what_is_not_a_plan_is_one_line(model: PeftModel, tmp_path: Path, change: Any, message: str) -> None:
    document = make(model).to_dict()
    change(document)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(document))
    with pytest.raises(CELoraError, match=message) as caught:
        Plan.load(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b"[" * 100_000, b"null"])
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(CELoraError):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(CELoraError, match="No such file"):
        Plan.load(tmp_path / "none.json")
