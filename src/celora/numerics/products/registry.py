"""The products by name."""

from __future__ import annotations

from celora.errors import unknown
from celora.numerics.products.base import Native, Product
from celora.numerics.products.both_ways import Int8BothWays
from celora.numerics.products.eight_bit import EightBit
from celora.numerics.products.fp8 import Fp8Product
from celora.numerics.products.int8 import Int8Product

PRODUCTS: dict[str, type[Product]] = {cls.name: cls for cls in (Native, Int8Product, Fp8Product)}


def make_product(name: str, *, copy: bool = True, forward: str = "exact") -> Product:
    """Make the product called `name`. With `forward="int8"` it also multiplies in the forward.

    Raises:
        CELoraError: there is no product of this name. The message has the nearest name.
    """
    if name not in PRODUCTS:
        raise unknown("precision", name, PRODUCTS)
    cls = PRODUCTS[name]
    if forward == Int8Product.name:
        return Int8BothWays(copy=copy)
    return cls(copy=copy) if issubclass(cls, EightBit) else cls()
