"""Takes away each private name of other libraries in turn. That may cost time, but never change a result."""

from __future__ import annotations

import warnings

import pytest
import torch

import celora
from celora import borrowed
from patching import patch_all
from small import make_model


@pytest.fixture(autouse=True)
def _looked_up_anew(monkeypatch: pytest.MonkeyPatch):
    borrowed.forget()
    yield
    monkeypatch.undo()
    borrowed.forget()


def take_away(patch: pytest.MonkeyPatch, missing: str) -> None:
    """Pretend that the installed version of the library lacks this name."""
    found = borrowed._look_up
    patch_all(patch, "celora.borrowed:_look_up", lambda name: None if name == missing else found(name))


def trained(preset: str | None) -> tuple[list[torch.Tensor], list[str]]:
    """The losses and last gradients of two steps on padded batches, and the warnings."""
    model = make_model().train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if preset is not None:
            celora.attach(model, preset)
        found = []
        for seed in range(2):
            tokens = torch.randint(0, 61, (3, 11), generator=torch.Generator().manual_seed(seed))
            mask = torch.ones_like(tokens)
            mask[0, 6:] = mask[2, 4:] = 0
            labels = tokens.masked_fill(mask == 0, -100)
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
            model.zero_grad()
            loss.backward()
            found.append(loss.detach())
        found += [p.grad for p in model.parameters() if p.requires_grad]
        if preset is not None:
            celora.detach(model)
    return found, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", borrowed.NAMES)
def test_the_installed_libraries_have_it(name):
    """Otherwise celora leaves something out for everybody, and the list or its use is out of date."""
    assert borrowed.borrow(name) is not None


@pytest.mark.parametrize("name", borrowed.NAMES)
def test_without_it_the_result_is_the_same(name, monkeypatch):
    plain, _ = trained(None)
    take_away(monkeypatch, name)
    found, said = trained("exact")
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    about = [text for text in said if name.replace(":", ".") in text]
    assert len(about) <= 1
    assert all(borrowed.NAMES[name] in text for text in about)


def test_a_missing_name_is_said_once(monkeypatch):
    monkeypatch.setitem(borrowed.NAMES, "torch:_no_such_name", "nothing is done")
    with pytest.warns(UserWarning, match=r"this version of torch has no torch\._no_such_name, so nothing is done"):
        assert borrowed.borrow("torch:_no_such_name") is None
    assert borrowed.borrow("torch:_no_such_name") is None
