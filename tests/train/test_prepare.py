"""audit sees the batches and the configuration of training. It trains nothing."""

from __future__ import annotations

import pytest

from celora.runtime.gate import EXACT
from celora.train import prepare
from celora.train.request.arguments import make_request


def test_audit_judges_an_adapter_with_the_configuration_it_was_trained_with(finished, inputs, tmp_path):
    request = {**inputs, "output": str(tmp_path / "none")}
    as_trained = prepare.audit_model(make_request(request), rows=4, adapter=finished[0])
    as_paper = prepare.audit_model(make_request({**request, "preset": "paper"}), rows=4, adapter=finished[0])
    assert as_trained.probed > as_paper.probed > 0
    of_checkpoint = prepare.audit_model(make_request(request), rows=4, adapter=finished[0] / "checkpoint-6")
    assert (of_checkpoint.cosine, of_checkpoint.relative_error) == (as_trained.cosine, as_trained.relative_error)


def test_audit_reads_rows_with_the_tokenizer_that_the_adapter_was_trained_with(finished, inputs, tmp_path, monkeypatch):
    """A run may have had another chat template than its base."""
    seen, build = [], prepare.build_trainer

    def built(request, args, model, tokenizer, *rest, **more):
        seen.append(tokenizer.name_or_path)
        return build(request, args, model, tokenizer, *rest, **more)

    monkeypatch.setattr(prepare, "build_trainer", built)
    request = make_request({**inputs, "output": str(tmp_path / "none"), "preset": "exact"})
    for adapter in (finished[0], None):
        prepare.audit_model(request, rows=4, adapter=adapter)
    assert seen == [str(finished[0]), str(inputs["model"])]


@pytest.mark.parametrize("preset", ["auto", "fast"])
def test_audit_judges_what_training_would_attach(preset, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("celora.runtime.gate._fastest", lambda *_: (EXACT, {}))
    request = make_request({**inputs, "output": str(tmp_path / "none"), "preset": preset})
    attached = []
    monkeypatch.setattr("celora.attach", lambda model, config: attached.append(config))
    monkeypatch.setattr("celora.audit", lambda *_, **__: None)
    prepare.audit_model(request, rows=4)
    assert {own["estimator"] for own in attached[0].overrides.values()} == {"dense"}
