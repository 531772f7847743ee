"""Products of bfloat16 and float16 in float32, by torch's operators, on CPUs that have no instructions for them.

There torch multiplies number by number: `x W^T` takes six times as long as in float32, and `G W` up to five hundred
times. float32 copies of the operands add a tenth to the time of a product in float32. They are made in parts, and
dropped when these have been multiplied. Sums stay in float32 until they are rounded once, as in torch's own product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from celora.kernels import plain
from celora.machine.cpu import multiplies

_HALF = (torch.bfloat16, torch.float16)
_ROWS = 2048  # tokens whose float32 copies are made at once
_MANY = 4  # tokens; for fewer, torch has fast code, if the numbers of a row are together
_NUMBERS = 2**22  # of a weight, of which a float32 copy of 16 MiB is made at once


def takes(x: Tensor) -> bool:
    """Whether x is of a dtype that this CPU does not multiply."""
    return x.dtype in _HALF and plain.is_plain(x) and not multiplies(x.dtype)


def takes_autocast(weight: Tensor) -> bool:
    """Whether autocast multiplies this weight in a dtype that this CPU does not multiply."""
    return weight.dtype == torch.float32 and plain.is_plain(weight) and not multiplies(torch.bfloat16)


def autocasts() -> bool:
    """Whether autocast is on, to a dtype that this CPU does not multiply."""
    if not torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    return not multiplies(torch.get_autocast_dtype("cpu"))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    turned = weight.stride(0) == 1 != weight.stride(1)  # its columns are together in memory, and are copied together
    if not turned and weight.dtype == x.dtype and x.numel() < _MANY * x.shape[-1]:
        return plain.linear(x, weight, bias, out=out)
    y = x.new_empty(*x.shape[:-1], weight.shape[0]) if out is None else out
    given, computed = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    with torch.autocast("cpu", enabled=False):
        for tokens in _parts(given):
            rows, result = given[tokens], computed[tokens]
            if turned:
                sums = rows.new_zeros(result.shape, dtype=torch.float32)
                for part in plain.blocks(weight.t(), _NUMBERS):
                    torch.addmm(sums, rows[:, part].float(), weight[:, part].float().t(), out=sums)
                result.copy_(sums if bias is None else sums.add_(bias.float()))
            else:
                wide = rows.float()
                for part in plain.blocks(weight, _NUMBERS):
                    of_bias = None if bias is None else bias[part].float()
                    result[:, part] = torch.nn.functional.linear(wide, weight[part].float(), of_bias)
    return y


def skinny_product(x: Tensor, m: Tensor, *, alpha: float, onto: Tensor | None) -> Tensor:
    wide = m.float()
    y = x.new_empty(len(x), m.shape[1]) if onto is None else onto
    for tokens in _parts(x):
        rows, result = x[tokens], y[tokens]
        if onto is None:
            product = rows.float() @ wide
            result.copy_(product if alpha == 1 else product.mul_(alpha))
        else:  # a product of both dtypes would be added number by number
            result.copy_(result.float().addmm_(rows.float(), wide, alpha=alpha))
    return y


def transposed_product(p: Tensor, x: Tensor) -> Tensor:
    y = torch.zeros(p.shape[1], x.shape[1], dtype=torch.float32, device=p.device)
    for tokens in _parts(p):
        y.addmm_(p[tokens].t().float(), x[tokens].float())
    return y


def _parts(x: Tensor) -> Iterator[slice]:
    """The tokens of `x: (T, n)`, as many as are copied at once."""
    return plain.blocks(x, _ROWS * x.shape[1])
