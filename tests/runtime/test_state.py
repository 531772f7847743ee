from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import celora
from celora import CELoraConfig, CELoraError
from celora.runtime import state
from celora.runtime.attachment import require
from celora.runtime.state import STATE_NAME
from machine import refuses_config
from patching import patch_all
from small import adapter, make_batch, make_model, train, written_whole

HALF = CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=4)
# The words are drawn again in every call.
WORDS = CELoraConfig(estimator="dense", labelled_head=True, head_keep_ratio=0.6, refresh_every=4)


# Each has more state than a selection: a ratio that has moved, a number of draws, a factor.
CONTROLLED = CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=2, target_error=0.2)
SAMPLED = CELoraConfig(keep_ratio=0.8, rank=4, selection="sampled", refresh_every=4)
GRADIENT = CELoraConfig(estimator="tokens", keep_ratio=0.5, rank=4, factor="gradient", refresh_every=4)
CONFIGS = {"columns": HALF, "words": WORDS, "controlled": CONTROLLED, "sampled": SAMPLED, "gradient": GRADIENT}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_resumed_run_equals_an_uninterrupted_one(stop: int, config: CELoraConfig, tmp_path: Path) -> None:
    whole = make_model()
    celora.attach(whole, config)
    train(whole, 10)

    first = make_model()
    celora.attach(first, config)
    optimizer = train(first, stop)
    celora.save_state(first, tmp_path)

    second = make_model()
    celora.attach(second, config)
    second.load_state_dict(first.state_dict())
    resumed = torch.optim.AdamW([p for p in second.parameters() if p.requires_grad], lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    celora.load_state(second, tmp_path)
    assert require(second).clock.step == stop
    train(second, 10 - stop, first=stop, optimizer=resumed)
    found = adapter(second)
    for name, value in adapter(whole).items():
        assert value.equal(found[name])


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 4},
        {"rank": 4, "factor": "gradient"},
        {"estimator": "tokens", "selection": "energy", "keep_ratio": 0.9, "precision": "int8"},
    ],
    ids=["columns", "gradient factor", "tokens"],
)
def test_what_an_interrupted_refresh_has_observed_is_forgotten(settings: dict[str, Any], tmp_path: Path) -> None:
    """A notebook, for example, may continue with the same model from its checkpoint."""
    config = CELoraConfig(**{"keep_ratio": 0.5, "refresh_every": 3, **settings})
    if refuses_config(config):
        return
    ends = []
    for interrupted in (False, True):
        model = make_model()
        celora.attach(model, config)
        train(model, 3)
        celora.save_state(model, tmp_path)
        if interrupted:
            model(**make_batch(99)).loss.mul(100).backward()  # the first call of step 3, a refresh
            model.zero_grad()
        celora.load_state(model, tmp_path)
        train(model, 2, first=3)
        celora.save_state(model, tmp_path)
        ends.append(load_file(tmp_path / STATE_NAME))
    assert ends[0].keys() == ends[1].keys()
    assert [key for key in ends[0] if not ends[0][key].equal(ends[1][key])] == []


def test_what_is_written(model: PeftModel, tmp_path: Path, disk: list[tuple[str, int]]) -> None:
    celora.attach(model, HALF)
    train(model, 6)
    folder = tmp_path / "not" / "there"
    assert celora.save_state(model, folder) == folder / STATE_NAME
    assert disk == written_whole(folder / STATE_NAME)
    assert [p.name for p in folder.iterdir()] == [STATE_NAME]
    saved = load_file(folder / STATE_NAME)
    assert saved["step"].item() == 6
    assert saved["base_model.model.model.layers.1.mlp.up_proj:index"].shape == (40,)
    errors = require(model).relative_errors
    assert errors
    celora.attach(model, "off")
    celora.attach(model, HALF)
    celora.load_state(model, folder)
    assert require(model).relative_errors == errors
    assert require(model).refreshes == 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux lists what is mapped")
def test_a_state_that_was_read_does_not_hold_its_file(model: PeftModel, tmp_path: Path) -> None:
    """Windows removes no file that is mapped, so old checkpoints would stay."""
    celora.attach(model, HALF)
    train(model, 2)
    celora.save_state(model, tmp_path)
    celora.load_state(model, tmp_path)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("synchronise", [False, True])
def test_each_process_keeps_what_it_alone_knows(
    synchronise: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CELoraConfig(keep_ratio=0.5, rank=4, synchronise=synchronise)
    models = [make_model(), make_model()]
    for first, model in zip((0, 7), models, strict=True):
        celora.attach(model, config)
        train(model, 2, first=first)
    patch_all(monkeypatch, "celora.machine.processes:in_company", lambda: True)

    def index(model: PeftModel) -> torch.Tensor:
        name = "base_model.model.model.layers.1.mlp.up_proj"
        return require(model).grafts[name].estimator.state_dict()["index"].clone()

    for rank, model in enumerate(models):
        monkeypatch.setattr(state.dist, "get_rank", lambda rank=rank: rank)
        celora.save_state(model, tmp_path)  # with `synchronise` only the first one writes
    names = [STATE_NAME] if synchronise else [STATE_NAME, "celora_state_1.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    expected = [index(models[0]), index(models[0 if synchronise else 1])]
    assert not expected[0].equal(index(models[1]))
    for rank, own in enumerate(expected):
        monkeypatch.setattr(state.dist, "get_rank", lambda rank=rank: rank)
        model = make_model()
        celora.attach(model, config)
        celora.load_state(model, tmp_path)
        assert index(model).equal(own)


def test_clear_errors(model: PeftModel, tmp_path: Path) -> None:
    with pytest.raises(CELoraError, match="celora is not attached"):
        celora.save_state(model, tmp_path)
    celora.attach(model, HALF)
    with pytest.raises(CELoraError, match=f"no {STATE_NAME} in"):
        celora.load_state(model, tmp_path)
    (tmp_path / STATE_NAME).write_bytes(b"not a tensor file")
    with pytest.raises(CELoraError, match="is damaged"):
        celora.load_state(model, tmp_path)
    save_file({"step": torch.ones(1)}, tmp_path / STATE_NAME)
    with pytest.raises(CELoraError, match=r"was not made by celora.save_state"):
        celora.load_state(model, tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", torch.zeros(2)),
        ("step", torch.tensor(float("nan"))),
        ("relative_error", torch.zeros(2)),
        ("relative_error", torch.zeros(0)),
        ("over_bound", torch.tensor(float("inf"))),
    ],
)
def test_what_should_be_one_number_and_is_not(model: PeftModel, tmp_path: Path, key: str, value: torch.Tensor) -> None:
    celora.attach(model, HALF)
    train(model, 2)
    file = celora.save_state(model, tmp_path)
    values = load_file(file)
    name = next(name for name in values if name.endswith(":index")).removesuffix("index")
    with safe_open(file, framework="pt") as opened:
        save_file(values | {key if key == "step" else name + key: value}, file, metadata=opened.metadata())
    with pytest.raises(CELoraError, match=rf"is damaged: {key} is no number") as caught:
        celora.load_state(model, tmp_path)
    assert "\n" not in str(caught.value)


def test_another_configuration_is_refused_and_nothing_is_lost(model: PeftModel, tmp_path: Path) -> None:
    celora.attach(model, HALF)
    train(model, 2)
    celora.save_state(model, tmp_path)
    celora.attach(model, CELoraConfig(keep_ratio=0.25, rank=4))
    differ = "was made with another configuration, with another keep_ratio and refresh_every. Attach that one"
    with pytest.raises(CELoraError, match=differ):
        celora.load_state(model, tmp_path)
    assert require(model).clock.step == 0


def test_a_state_that_fits_only_in_part_changes_nothing(model: PeftModel, tmp_path: Path) -> None:
    celora.attach(model, HALF)
    train(model, 2)
    file = celora.save_state(model, tmp_path)
    values = load_file(file)
    last = [key for key in values if key.endswith(":index")][-1]
    values[last] = values[last][:-1].clone()
    with safe_open(file, framework="pt") as opened:
        save_file(values, file, metadata=opened.metadata())
    celora.attach(model, "off")
    celora.attach(model, HALF)
    with pytest.raises(CELoraError, match="does not fit a layer that keeps"):
        celora.load_state(model, tmp_path)
    assert require(model).clock.step == 0
    assert not any(graft.estimator.ready for graft in require(model).grafts.values())
