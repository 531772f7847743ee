"""A cell has the model and the batches that its name promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from celora.studies.cells import Cell, make_batches, make_model, told
from patching import patch_all

SMALL = Cell("h64-v1k", "instruct", "float32", 64)


def test_what_the_models_are_is_told() -> None:
    text = told(["smollm2", "h1024-v32k", "h2048-v128k", "h1024-v32k", "llama-3b"])
    assert text.split(". ") == [
        "smollm2: SmolLM2-135M-Instruct, its weights unpacked from 4 bits (Q4_1)",
        "h1024-v32k: a Llama of random weights, hidden size 1,024, 8 blocks, 32,000 words",
        "h2048-v128k: a Llama of random weights, hidden size 2,048, 4 blocks, 128,000 words",
        "llama-3b: a Llama of random weights, hidden size 3,072, 28 blocks, 128,256 words.",
    ]


@pytest.mark.parametrize(("name", "numbers"), [("llama-1b", 1_235_814_400), ("llama-8b", 8_030_261_248)])
def test_a_llama_has_its_shape_and_is_made_where_it_will_be(
    name: str, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is drawn here: all of it is made on the device `meta`."""
    patch_all(monkeypatch, "celora.machine.device:default_device", lambda: torch.device("meta"))
    model = make_model(Cell(name, "full"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert sum(p.numel() for p in frozen) == numbers
    assert make_batches(Cell(name, "full", tokens=2048))[0]["input_ids"].shape == (8, 256)


def test_the_upper_half_has_half_of_the_adapters(tmp_path: Path) -> None:
    counts = [
        sum(p.numel() for p in make_model(SMALL, upper=upper).parameters() if p.requires_grad)
        for upper in (False, True)
    ]
    assert counts[0] == 2 * counts[1]


def test_data() -> None:
    full, instruct = make_batches(Cell("h64-v1k", "full", tokens=1024)), make_batches(Cell("h64-v1k", "instruct"))
    assert all((batch["labels"] == batch["input_ids"]).all() for batch in full)
    assert full[0]["input_ids"].shape == (4, 256)
    for batch in instruct:
        lengths = batch["attention_mask"].sum(1)
        assert lengths.max() == batch["input_ids"].shape[1]
        labelled = (batch["labels"] != -100).sum(1) / lengths
        assert ((labelled > 0.29) & (labelled < 0.33)).all()
    assert len({batch["input_ids"].shape for batch in instruct}) > 1
