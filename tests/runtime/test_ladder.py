"""Refreshes adjust preset auto's rule by measured errors: in all processes alike, and again in a resumed run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import celora
from celora import CELoraConfig
from celora.errors import CELoraError
from celora.modeling.switch import Mode
from celora.runtime.attachment import Attachment, require
from celora.runtime.ladder import Ladder, Move
from celora.settings.names import HEAD
from patching import patch_all
from small import make_batch, make_model

LAYER = "model.layers.0.mlp.up_proj"


def kept(ladder: Ladder, layer: str, *errors: float) -> list[float]:
    """What the layer keeps after each of these errors. It begins with the rule's share."""
    shares, share = [], 0.1 if layer == HEAD else 0.9997
    for step, error in enumerate(errors):
        share = ladder.move(layer, share, error, step)
        shares.append(share)
    return shares


def test_a_layer_moves_up_by_one_rung_and_never_down() -> None:
    ladder = Ladder(0.05)
    assert kept(ladder, "too far off", 0.02, 0.06) == [0.9997, 1.0]
    assert kept(ladder, "as it should be", 0.018, 0.05, 0.0) == [0.9997] * 3
    assert kept(ladder, HEAD, 0.001, 0.06, 0.001, 0.06) == [0.1, 0.3, 0.3, 1.0]
    assert kept(ladder, "not a number", float("nan"), float("inf")) == [0.9997, 1.0]
    assert ladder.exact == {"too far off", HEAD, "not a number"}
    assert ladder.moves[1] == Move(1, HEAD, 0.1, 0.3, 0.06)
    assert ladder.keeps(HEAD, 0.1) == 1.0
    assert ladder.keeps("as it should be", 0.9997) == 0.9997
    before = list(ladder.moves)
    assert ladder.move("of the user's", 0.9, 0.5, 1) == 0.9
    assert ladder.move("of the user's, too", 0.999, 0.06, 1) == 0.999
    assert ladder.moves == before
    assert kept(Ladder(None), LAYER, 0.9, 0.0) == [0.9997, 0.9997]


def test_moves_are_saved_and_loaded() -> None:
    ladder, other = Ladder(0.05), Ladder(0.05)
    kept(ladder, LAYER, 0.001, 0.06)
    kept(ladder, HEAD, 0.06)
    other.load(ladder.to_json(), [LAYER, HEAD])
    assert other.moves == ladder.moves
    for spoilt, reason in (
        ("{", "no moves of layers: JSONDecodeError"),
        ("3", "no moves of layers: TypeError"),
        ('[{"step": 1}]', "no moves of layers: TypeError"),
        (ladder.to_json().replace("0.3,", "1.5,"), "shares that no layer keeps"),
        (ladder.to_json().replace("0.3,", '"all",'), "no moves of layers: TypeError"),
        (Ladder(0.05).to_json().replace("[]", '[{"step":1,"layer":"x","kept":1,"keeps":1,"relative_error":1}]'), "'x'"),
    ):
        with pytest.raises(CELoraError, match=reason):
            other.load(spoilt, [LAYER, HEAD])
        assert other.moves == ladder.moves
    assert other.move(HEAD, 0.3, 0.06, 2) == 1.0


# Half of the energy loses much in every layer. Leaving out a fifth of the 61 words loses something in the head.
RULE = CELoraConfig(
    estimator="tokens", selection="energy", keep_ratio=0.5, rank=0, most_error=0.3, refresh_every=20, spread=True,
    labelled_head=True, head_keep_ratio=0.8,
)  # fmt: skip


@pytest.fixture
def rungs(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_all(monkeypatch, "celora.runtime.ladder:SHARES", (0.5,))
    patch_all(monkeypatch, "celora.runtime.ladder:WORDS", (0.8, 0.9))


def trained(model: PeftModel, first: int, count: int) -> Attachment:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(first, first + count):
        model(**make_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return require(model)


def parameters(model: PeftModel) -> list[torch.Tensor]:
    return [p.detach() for p in model.parameters() if p.requires_grad]


@pytest.mark.usefixtures("rungs")
def test_every_layer_is_measured_within_the_first_steps_and_adjusted() -> None:
    model = make_model()
    celora.attach(model, RULE)
    attachment = trained(model, 0, 10)
    seen = {name for name, graft in attachment.grafts.items() if graft.observed}
    assert len(seen) >= 11  # all, except those of the first block whose input needs no gradient
    assert {*attachment.relative_errors} == {*seen, HEAD}
    over = {name for name, error in attachment.relative_errors.items() if error > 0.3}
    assert len(over) >= 3
    assert over <= {move.layer for move in attachment.ladder.moves}
    for name, graft in attachment.grafts.items():
        if name not in attachment.made_exact:
            assert graft.estimator.keep_ratio == 0.5
    assert attachment.forward is not None
    assert attachment.forward.keep_ratio == attachment.ladder.keeps(HEAD, 0.8)


@pytest.mark.usefixtures("rungs")
def test_what_loses_too_much_on_the_last_rung_is_exact_and_a_resumed_run_repeats_it(tmp_path: Path) -> None:
    config = CELoraConfig(**{**RULE.to_dict(), "most_error": 0.004, "refresh_every": 5})
    whole, part, resumed = make_model(), make_model(), make_model()
    for model in (whole, part, resumed):
        celora.attach(model, config)
    trained(whole, 0, 24)
    for saved in (3, 12):
        trained(part, require(part).clock.step, saved - require(part).clock.step)
        celora.save_state(part, tmp_path)
        with torch.no_grad():
            for own, other in zip(parameters(resumed), parameters(part), strict=True):
                own.copy_(other)
        celora.load_state(resumed, tmp_path)
        attachment = trained(resumed, saved, 24 - saved)
        assert attachment.ladder.moves == require(whole).ladder.moves
        assert all(a.equal(b) for a, b in zip(parameters(resumed), parameters(whole), strict=True))
    assert len(attachment.made_exact) >= 5
    assert HEAD in attachment.made_exact
    assert {graft.mode for name, graft in attachment.grafts.items() if name in attachment.made_exact} == {Mode.EXACT}
    metrics = {"loss": 1.0}
    celora.Callback().on_log(None, type("State", (), {"log_history": []})(), None, model=resumed, logs=metrics)
    assert metrics["celora/layers_made_exact"] == len(attachment.made_exact)


@pytest.mark.usefixtures("rungs")
def test_processes_move_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest error that any process has seen decides, also for layers that this process saw nothing of."""
    model = make_model()
    celora.attach(model, RULE)
    attachment = require(model)
    names = [*attachment.grafts]
    monkeypatch.setattr("celora.runtime.agreement.in_company", lambda: True)
    told = [[400_000], [10_000], *([-1] for _ in range(len(names) - 1))]
    asked: list[int] = []
    monkeypatch.setattr("celora.runtime.agreement.largest_of_all", lambda own, device: asked.append(len(own)) or told)
    trained(model, 0, 1)
    assert asked == [len(names) + 1]
    assert attachment.ladder.moves == [Move(1, names[0], 0.5, 1.0, 0.4)]


def test_a_checkpoint_of_an_earlier_version_has_no_moves(tmp_path: Path) -> None:
    model = make_model()
    celora.attach(model, RULE)
    file = celora.save_state(model, tmp_path)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    state = load_file(file)
    save_file(state, file, metadata={"config": metadata["config"]})
    celora.load_state(model, tmp_path)
    assert require(model).ladder.moves == []
    save_file(state, file, metadata={**metadata, "moves": "[1]"})
    with pytest.raises(CELoraError, match="is damaged: no moves of layers"):
        celora.load_state(model, tmp_path)
