"""8-bit products as operators of a graph: what the copy itself computes, and the shapes that they promise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.library import opcheck

from celora.kernels.c.both import TurnedPanels
from celora.kernels.packed import QuantisedRows
from celora.kernels.plain import IntegersBothWays, row_scales
from celora.kernels.recorded import input_in_graph, product_in_graph, product_of_gradients, product_of_rows, recorded
from celora.kernels.triton.product import TiledBothWays
from machine import refuses

CHECKED = ("test_schema", "test_faketensor")
SKIPPED = pytest.mark.skipif(refuses(), reason="no 8-bit products here, which is tested in test_products")


@SKIPPED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_what_the_copy_computes(dtype: torch.dtype, scaled: bool) -> None:
    weight, bias = torch.randn(24, 16), torch.randn(24)
    packed = IntegersBothWays.pack(weight, row_scales(weight), torch.rand(16) + 0.5 if scaled else None)
    copy = recorded(packed)
    assert copy is not None
    x, gradients = torch.randn(3, 7, 16, dtype=dtype), torch.randn(21, 24, dtype=dtype)
    rows = packed.quantise(x.view(21, 16))
    expected = packed.multiply(rows, bias, x.new_empty(21, 24))
    assert product_in_graph(x, copy, bias, dtype).equal(expected.view(3, 7, 24))
    backward = gradients, *copy
    assert product_of_gradients(*backward).equal(packed.rows(gradients, None, position=None, onto=None))
    opcheck(input_in_graph, (x.view(21, 16), copy.input_scale, copy.layout), test_utils=CHECKED)
    opcheck(product_of_rows, (rows.q, rows.scale, bias, dtype, *copy), test_utils=CHECKED)
    opcheck(product_of_gradients, backward, test_utils=CHECKED)


@SKIPPED
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
def test_one_graph_serves_any_number_of_rows() -> None:
    weight = torch.randn(24, 16)
    packed = IntegersBothWays.pack(weight, row_scales(weight))
    copy, shapes = recorded(packed), list[torch.Size]()
    assert copy is not None

    def both(x: Tensor) -> Tensor:
        return product_of_gradients(product_in_graph(x, copy, None, torch.float32), *copy)

    def record(graph: fx.GraphModule, _: object) -> Callable[..., object]:
        shapes.append(graph.graph.find_nodes(op="output")[0].args[0][0].meta["example_value"].shape)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend=record)
    for rows in (5, 7, 12):
        x = torch.randn(rows, 16)
        assert compiled(x).equal(both(x))
    torch._dynamo.reset()
    assert len(shapes) == 1
    assert isinstance(shapes[0][0], torch.SymInt)


def test_the_layouts_of_accelerators() -> None:
    q, scale = torch.zeros(8, 8, dtype=torch.int8), torch.ones(8)
    copies = [recorded(layout(q, scale)) for layout in (IntegersBothWays, TiledBothWays)]
    assert {copy.layout for copy in copies if copy is not None} == {"IntegersBothWays", "TiledBothWays"}
    assert recorded(object.__new__(TurnedPanels)) is None
    # CUDA graphs read marked tensors where they are, and copy others at each replay.
    assert {getattr(t, "_dynamo_static_input_type", "") for t in (q, scale)} == {"unguarded"}


@pytest.mark.parametrize("shape", [(32, 48), (24, 48), (32, 40)])
def test_torch_multiplies_where_tritons_product_would_spill(shape: tuple[int, int]) -> None:
    """Over a depth that is no multiple of 16; each side is the depth of one direction."""
    weight = torch.randn(shape)
    scale = row_scales(weight)
    packed = TiledBothWays.pack(weight, scale)
    expected = TiledBothWays if shape == (32, 48) else IntegersBothWays
    assert type(packed) is type(TiledBothWays.holding(packed.stored, scale, shape[1])) is expected
    assert packed.stored.equal(IntegersBothWays.pack(weight, scale).stored)


@SKIPPED
def test_the_operators_read_their_tensors_alone() -> None:
    """A CUDA graph repeats the launches of its recording, so nothing else may decide what they compute."""
    weight, x = torch.randn(8, 16), torch.randn(3, 16)
    packed = IntegersBothWays.pack(weight, row_scales(weight))
    copy, rows = recorded(packed), input_in_graph(x, None, "IntegersBothWays")
    assert copy is not None
    before = product_of_rows(*rows, None, torch.float32, *copy)
    packed.scale.mul_(2)
    assert product_of_rows(*rows, None, torch.float32, *copy).equal(2 * before)
    assert packed.multiply(QuantisedRows(*rows), None, torch.empty(3, 8)).equal(2 * before)
