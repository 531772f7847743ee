"""Attention of all packed sequences in one call, on a CUDA device. Not measured.

In float16 and bfloat16 this is torch's variable-length attention or, where torch has none, that of the package
flash-attn. Both are given where each sequence begins. In float32, for heads of a size that these refuse, and on GPUs
that they refuse, it is torch's FlexAttention, which is given a mask.
Elsewhere sequences are computed one by one (`celora.modeling.attention`).
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from celora.errors import out_of_memory

_HALF = (torch.float16, torch.bfloat16)
_TURING, _AMPERE = (7, 5), (8, 0)  # the compute capabilities that FlexAttention and `half_function` need
_LARGEST_HEAD, _MULTIPLE = 256, 8  # head sizes that they take
_NEEDED = {"scale", "window_size"}  # arguments of `varlen_attn` that its first versions lack
_ROUNDINGS = 4  # steps of a dtype that a result may be off by: more than ten times as far is what a wrong mask gives
_TF32 = 2.0**-10  # a step of float32 in products that may drop its last digits
_BLOCK = 128  # tokens of one block of a `BlockMask`
_GROUPED = "enable_gqa"  # came later: until then, key and value get as many heads as the query

# query (N, heads, d), key and value (N, the same or fewer heads, d), where sequences begin, the longest, the scale
Function = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]


def available(device: torch.device) -> bool:
    """Whether this is a device that one call may compute all packed sequences on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _TURING


def _before_ampere(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < _AMPERE


def compiles(config: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one call computes them in a model with this configuration, and one graph serves all batches.

    FlexAttention's mask is another function for each batch, so it would be a graph for each.
    """
    plain = _without_mask(device, dtype, head_size(config)) and not getattr(config, "attention_dropout", 0)
    return plain and computes(config, device, dtype)


def computes(config: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether one call computes all packed sequences of a model with this configuration. The first time, it is tried.

    Builds of torch may lack a kernel for this device, or its backward, and FlexAttention needs Triton.
    """
    if not available(device) or (dtype == torch.bfloat16 and _before_ampere(device)):
        return False
    return _works(device, dtype, head_size(config))


def head_size(config: Any) -> int:
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


@functools.cache
def _works(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether forward and backward of two sequences with heads of this size are those of torch's attention of each.

    Results may be `_ROUNDINGS` steps apart: probabilities, their gradients and results are rounded to the dtype.
    """
    begins, module = torch.arange(0, 257, 128, dtype=torch.int32, device=device), nn.Identity()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    drawn = torch.Generator("cpu").manual_seed(0)  # the user's draws stay as they are
    *given, grad = (
        torch.randn(1, heads, 256, size, generator=drawn, device="cpu").to(device, dtype) for heads in (4, 2, 2, 4)
    )

    def results(out: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.double() for t in (out.detach(), *torch.autograd.grad(out, tensors, grad.transpose(1, 2).to(out)))]

    # A checkpoint around the model must not see what is saved here: it would miss that in the repetition.
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False), hooks:
            tensors, wide = ([t.to(kind).requires_grad_() for t in given] for kind in (dtype, torch.float64))
            query, key, value = tensors
            mask = block_mask(begins, 256, dtype, size)
            found = attend(module, query, key, value, begins, 128, mask, size**-0.5)
            if found is None:
                return False
            pieces = zip(*(t.split(128, 2) for t in wide), strict=True)
            each = [scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) for q, k, v in pieces]
            exact = results(torch.cat(each, 2).transpose(1, 2), wide)
            pairs = zip(results(found, tensors), exact, strict=True)
            far = torch.stack([(one - other).norm() / other.norm() for one, other in pairs])
        return bool((far <= _ROUNDINGS * max(torch.finfo(dtype).eps, _TF32)).all())  # not where it is a NaN
    except Exception as error:  # whatever it raises, sequences can be computed one by one
        if out_of_memory(error):
            raise
        return False


def _takes(head_size: int) -> bool:
    return head_size <= _LARGEST_HEAD and head_size % _MULTIPLE == 0


def _without_mask(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether `half_function` computes heads of this dtype and size on this device."""
    return dtype in _HALF and _takes(head_size) and not _before_ampere(device) and half_function() is not None


def half_function() -> Function | None:
    """Causal attention of sequences of different lengths in float16 and bfloat16, or None. It returns (N, heads, d)."""
    return _torch_function() or _flash_function()


@functools.cache
def _torch_function() -> Function | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    taken = inspect.signature(varlen_attn).parameters.keys()
    if not taken >= _NEEDED:
        return None

    def attend(query: Tensor, key: Tensor, value: Tensor, begins: Tensor, longest: int, scale: float) -> Tensor:
        more: dict[str, Any] = {}
        if (groups := query.shape[1] // key.shape[1]) > 1:
            if _GROUPED in taken:
                more = {_GROUPED: True}
            else:
                key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        found = varlen_attn(query, key, value, begins, begins, longest, longest, scale=scale, window_size=(-1, 0),
                            **more)  # fmt: skip
        return cast(Tensor, found)

    return attend


@functools.cache
def _flash_function() -> Function | None:
    if importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:  # it was built for another version of torch
        return None

    def attend(query: Tensor, key: Tensor, value: Tensor, begins: Tensor, longest: int, scale: float) -> Tensor:
        found: Tensor = flash_attn_varlen_func(query, key, value, begins, begins, longest, longest,
                                               softmax_scale=scale, causal=True)  # fmt: skip
        return found

    return attend


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, begins: Tensor, longest: int, mask: Any, scale: float
) -> Tensor | None:
    """Causal attention of each packed sequence, (1, heads, N, d) to (1, N, heads, d), or None if nothing takes it.

    Under autocast it computes in autocast's dtype.

    Args:
        module: the attention, for FlexAttention.
        begins: (S + 1,) int32, where each of S sequences begins, and the end of the last.
        longest: number of tokens of the longest sequence.
        mask: from `block_mask`. FlexAttention computes the sequences if it has a function.
    """
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype != torch.float64:  # as SDPA; a model in float32 gives a mixture
        query, key, value = (t.to(torch.get_autocast_dtype(kind)) for t in (query, key, value))
    if hasattr(mask, "mask_mod"):
        found: Tensor = AttentionInterface()["flex_attention"](module, query, key, value, mask, scaling=scale)[0]
        return found
    size, function = query.shape[3], half_function()
    alike = query.dtype == key.dtype == value.dtype and size == key.shape[3] == value.shape[3]
    if function is None or not alike or query.dtype not in _HALF or not _takes(size):
        return None
    query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
    return function(query, key, value, begins, longest, scale)[None]


def block_mask(begins: Tensor, tokens: int, dtype: torch.dtype, head_size: int) -> Any:
    """The `BlockMask` with which FlexAttention computes packed sequences, (1, 1, tokens, tokens).

    A token attends to itself and to earlier tokens of its sequence. None where `half_function` computes heads of this
    dtype and size. It is torch's `create_block_mask`, which would ask of each pair of tokens; here, of blocks.
    """
    if _without_mask(begins.device, dtype, head_size):
        return None
    from torch.nn.attention.flex_attention import BlockMask

    sequence = torch.bucketize(torch.arange(tokens, device=begins.device), begins[1:], right=True)

    def seen(batch: Tensor, head: Tensor, of: Tensor, at: Tensor) -> Tensor:
        return (sequence[of] == sequence[at]) & (of >= at)

    starts = torch.arange(0, tokens, _BLOCK, device=begins.device)
    opens, closes = sequence[starts], sequence[(starts + _BLOCK - 1).clamp(max=tokens - 1)]
    query = starts[:, None]
    # All pairs of a block are seen if its key's first token is in the sequence of its query's last.
    whole = (query > starts) & (closes[:, None] == opens) & (query + _BLOCK <= tokens)
    some = (query >= starts) & (opens[:, None] <= closes) & ~whole
    return BlockMask.from_kv_blocks(
        *_in_order(some), *_in_order(whole), BLOCK_SIZE=_BLOCK, mask_mod=seen, seq_lengths=(tokens, tokens)
    )


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are marked, (1, 1, rows), and the blocks, (1, 1, rows, columns), these first."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]
