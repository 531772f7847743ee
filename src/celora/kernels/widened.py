"""Products of bfloat16 and float16 in float32, by torch's operators, on CPUs that have no instructions for them.

There torch multiplies number by number: `x W^T` takes six times as long as in float32, and `G W` up to five hundred
times. float32 copies of the operands add a tenth to the time of a product in float32. They are made in parts, and
dropped when these have been multiplied. Sums stay in float32 until they are rounded once, as in torch's own product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from celora.kernels import plain
from celora.machine.cpu import multiplies

_HALF = (torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)
_ROWS = 2048  # tokens whose float32 copies are made at once
_MANY = 4  # tokens; for fewer, torch has fast code, if the numbers of a row are together
_NUMBERS = 2**22  # of a weight, of which a float32 copy of 16 MiB is made at once


def takes(x: Tensor) -> bool:
    """Whether x is of a dtype that this CPU does not multiply."""
    if torch.compiler.is_compiling() or x.dtype not in _HALF or x.device.type != "cpu" or type(x) not in _PLAIN:
        return False
    return not multiplies(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    turned = weight.stride(0) == 1 != weight.stride(1)  # its columns are together in memory, and are copied together
    if not turned and x.numel() < _MANY * x.shape[-1]:
        return plain.linear(x, weight, bias, out=out)
    y = x.new_empty(*x.shape[:-1], weight.shape[0]) if out is None else out
    for rows, result in zip(x.reshape(-1, x.shape[-1]).split(_ROWS), y.view(-1, y.shape[-1]).split(_ROWS), strict=True):
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
    for start in range(0, len(x), _ROWS):  # `split` gives views that autograd lets nobody write into
        rows, result = x[start : start + _ROWS], y[start : start + _ROWS]
        if onto is None:
            product = rows.float() @ wide
            result.copy_(product if alpha == 1 else product.mul_(alpha))
        else:  # a product of both dtypes would be added number by number
            result.copy_(result.float().addmm_(rows.float(), wide, alpha=alpha))
    return y


def transposed_product(p: Tensor, x: Tensor) -> Tensor:
    y = torch.zeros(p.shape[1], x.shape[1], dtype=torch.float32, device=p.device)
    for left, right in zip(p.split(_ROWS), x.split(_ROWS), strict=True):
        y.addmm_(left.t().float(), right.float())
    return y
