"""The table of kernels: the order of backends, their reasons, and the recipe for a new backend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from celora.errors import CELoraError
from celora.kernels import backends
from celora.kernels.backends import TABLE, Backend, available, choose, explain, register
from celora.numerics.estimators import Tokens
from celora.studies.doctor import examine
from without import without

RECIPE = Path(__file__).parents[2] / "docs/develop/new-kernel.md"


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove what a test registers, once it is over."""
    without(monkeypatch)


def test_the_recipe_for_a_backend_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's own code runs. Then estimators and `celora doctor` use the new backend."""
    blocks = RECIPE.read_text(encoding="utf-8").split("```python\n")[1:]
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.partition("```")[0], names)
    calls: list[torch.Size] = []
    toy = next(b for b in TABLE["squared_row_norms"] if b.name == "einsum")

    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape)
        return toy.run(x)

    register("squared_row_norms", Backend("einsum", counted, toy.takes))
    G, W = torch.randn(20, 32), torch.randn(32, 48)
    Tokens(32, 48, keep_ratio=0.5).estimate(G, W)
    assert calls == [(20, 32)]
    monkeypatch.setattr("celora.studies.doctor._SHAPES", {"cpu": (32, 64, 48)})
    assert examine()["kernels"]["chosen"]["squared_row_norms"] == "einsum"


def test_the_table_is_full_whatever_is_imported_first() -> None:
    code = "from celora.kernels.backends import explain; import torch; print(explain('scatter_rows', torch.ones(2, 4)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == explain("scatter_rows", torch.ones(2, 4))


def test_a_backend_replaces_one_of_its_own_name() -> None:
    before = len(TABLE["column_maxima"])
    for result in (1.0, 2.0):
        register("column_maxima", Backend("toy", lambda x, result=result: x.new_full((x.shape[1],), result)))
    assert len(TABLE["column_maxima"]) == before + 1
    assert choose("column_maxima", torch.ones(2, 3)).run(torch.ones(2, 3)).tolist() == [2, 2, 2]


def test_operations_that_are_not_known() -> None:
    with pytest.raises(CELoraError, match="unknown operation 'column_maximum'; did you mean 'column_maxima'"):
        register("column_maximum", Backend("toy", torch.amax))


def test_an_operation_that_no_backend_computes_here(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "c", operations=("gated",))
    x = torch.ones(2, 2)
    assert not available("gated", x)
    with pytest.raises(CELoraError, match=r"no backend computes 'gated' for torch\.float32 on cpu"):
        choose("gated", x)


def test_why_a_faster_backend_is_passed_over_is_said() -> None:
    mps = torch.device("mps")
    register("pack_weight", Backend("toy", lambda *_: None, lambda _: False, lambda _: "it is a toy"))
    assert explain("pack_weight", torch.device("cuda")) == "torch's integer product: it is a toy"
    assert explain("pack_weight", mps) == "none: there are no int8 products on mps"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_operation_says_who_computes_it(dtype: torch.dtype) -> None:
    chosen = backends.chosen(dtype, torch.device("cpu"))
    assert chosen.keys() == TABLE.keys()
    for name in ("squared_row_norms", "column_maxima", "choose_rows", "quantise_rows", "scatter_rows", "softmax_rows"):
        assert chosen[name] in ("c", "torch")
