"""The products by name."""

from __future__ import annotations

from celora.errors import unknown
from celora.numerics.products.base import Native, Product
from celora.numerics.products.both_ways import Int8BothWays
from celora.numerics.products.eight_bit import EightBit
from celora.numerics.products.fp8 import Fp8
from celora.numerics.products.int8 import Int8

PRODUCTS: dict[str, type[Product]] = {cls.name: cls for cls in (Native, Int8, Fp8)}


def make_product(name: str, *, copy: bool = True, forward: str = "exact") -> Product:
    """The product called `name`, which also multiplies in the forward where that is `int8`.

    Raises:
        CELoraError: there is none of this name; the nearest one is said.
    """
    if name not in PRODUCTS:
        raise unknown("precision", name, PRODUCTS)
    cls = PRODUCTS[name]
    if forward == Int8.name:
        return Int8BothWays(copy=copy)
    return cls(copy=copy) if issubclass(cls, EightBit) else cls()
