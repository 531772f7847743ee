"""Follows the recipe for an estimator: registered from outside, it is audited, saved and shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import celora
from celora import CELoraConfig, CELoraError
from celora.cli.main import main
from celora.modeling.graft import LayerGraft
from celora.modeling.switch import Mode, Switch
from celora.numerics.estimators import ESTIMATORS
from small import adapter, make_model, masked_batch, train
from tiny import save_rows, save_tiny_model

RECIPE = Path(__file__).parents[2] / "docs/develop/new-estimator.md"


@pytest.fixture(autouse=True)
def config() -> Iterator[CELoraConfig]:
    """The page's own code, run unchanged. What it registers is removed afterwards."""
    before, names = dict(ESTIMATORS), dict[str, Any]()
    for block in RECIPE.read_text(encoding="utf-8").split("```python\n")[1:]:
        exec(block.partition("```")[0], names)
    yield names["config"]
    ESTIMATORS.clear()
    ESTIMATORS.update(before)


def test_it_estimates_what_its_docstring_says(model: PeftModel, config: CELoraConfig) -> None:
    blocks = ESTIMATORS["blocks"](48, 20, keep_ratio=0.34)
    W, G = torch.randn(48, 20), torch.randn(9, 48)
    G[:, 16:32] *= 10
    blocks.observe(G, W, G @ W)
    blocks.select()
    torch.testing.assert_close(blocks.estimate(G, W), G[:, 16:32] @ W[16:32])


def test_layers_that_it_cannot_do_stay_exact_with_the_reason(model: PeftModel, config: CELoraConfig) -> None:
    report = celora.attach(model, config)
    assert {layer.estimator for layer in report.estimated.values()} == {"blocks"}
    assert set(report.skipped.values()) == {"24 columns are not whole blocks of 16"}
    assert {name.rpartition(".")[2] for name in report.skipped} == {"k_proj", "v_proj"}
    train(model, 12)
    audited = celora.audit(model, masked_batch(2))
    assert min(audited.per_layer[name].cosine for name in report.estimated) < 1 > audited.cosine


def test_a_resumed_run_equals_an_uninterrupted_one(config: CELoraConfig, tmp_path: Path) -> None:
    whole, first, second = make_model(), make_model(), make_model()
    for model in (whole, first, second):
        assert "blocks" in str(celora.attach(model, config))
    train(whole, 10)
    optimizer = train(first, 6)
    celora.save_state(first, tmp_path)
    second.load_state_dict(first.state_dict())
    resumed = torch.optim.AdamW([p for p in second.parameters() if p.requires_grad], lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    celora.load_state(second, tmp_path)
    train(second, 4, first=6, optimizer=resumed)
    found = adapter(second)
    assert all(value.equal(found[name]) for name, value in adapter(whole).items())


# While Dynamo traces a Function, it instantiates the class. torch itself warns about that.
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
def test_compiled_it_uses_the_latest_selection() -> None:
    linear, G = torch.nn.Linear(16, 48).requires_grad_(False), torch.randn(9, 48)
    W, layer = linear.weight, LayerGraft(ESTIMATORS["blocks"](48, 16, keep_ratio=0.34), Switch())
    layer.mode = Mode.ESTIMATE
    linear.register_forward_hook(layer)
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for block in (slice(0, 16), slice(32, 48)):
        seen = torch.zeros(9, 48)
        seen[:, block] = 1
        layer.estimator.observe(seen, W, seen @ W)
        layer.estimator.select()
        x = torch.randn(9, 16, requires_grad=True)
        compiled(x).backward(G)
        torch.testing.assert_close(x.grad, G[:, block] @ W[block])


def test_the_application_trains_resumes_and_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path / "model")
    save_rows(tmp_path / "rows.jsonl")
    (tmp_path / "run.yaml").write_text("celora: {estimator: blocks, keep_ratio: 0.5, refresh_every: 2}\n")
    out = tmp_path / "out"
    command = ["train", "--config", str(tmp_path / "run.yaml"), "--model", str(tmp_path / "model"), "--data"]
    command += [str(tmp_path / "rows.jsonl"), "--output", str(out), "--save_steps", "2", "--max_steps"]
    assert main([*command, "2"]) == 0
    assert main([*command, "4", "--resume"]) == 0
    assert "blocks" in capsys.readouterr().err
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert {layer["estimator"] for layer in run["layers"]} == {"blocks"}
    assert "blocks" in (out / "report.html").read_text(encoding="utf-8")


def test_help_and_errors_name_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help-all"]) == 0
    assert "blocks, columns, dense" in capsys.readouterr().out
    with pytest.raises(CELoraError, match="unknown estimator 'block'; did you mean 'blocks'"):
        CELoraConfig(estimator="block")
    with pytest.raises(CELoraError, match="precision='int8' means nothing to the estimator 'blocks'"):
        CELoraConfig(estimator="blocks", precision="int8")
