"""Causal attention of packed sequences, each by itself, with Transformers' `sdpa` or with a faster kernel.

On CPU, our own kernel computes forward and backward of training, packed or not. On a CUDA device, all packed sequences
are one call (`celora.modeling.varlen`). Elsewhere, attention is torch's.

The model's configuration keeps naming `sdpa`. It names our attention only while an attention runs that was called with
`celora_lengths` (`Lookup`). Gradient checkpointing repeats the call in backward with the same arguments, so it finds
the same attention.
"""

from __future__ import annotations

import warnings
from itertools import accumulate
from types import BuiltinFunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from celora.borrowed import borrow
from celora.errors import CELoraError
from celora.kernels import operations
from celora.modeling import varlen
from celora.modeling.compiled import is_compiled
from celora.modeling.graft import in_dispatch_mode
from celora.modeling.hooks import Hook
from celora.modeling.own_forward import OwnForward
from celora.numerics.passes import ready, untraced

ATTENTION = "celora_packed_sdpa"
LENGTHS = "celora_lengths"
_DTYPES = (torch.float32, torch.bfloat16)  # of our kernel
_said: set[str] = set()  # kinds of devices
_IMPLEMENTATION = "transformers:PretrainedConfig._attn_implementation"


def implementation(config: Any) -> str | None:
    """The name of a model's attention; None if this version of Transformers does not tell it."""
    name = borrow(_IMPLEMENTATION)
    found: str | None = None if name is None else name.fget(config)
    return found


def may_replace(config: Any, device: torch.device) -> bool:
    """Whether our attention may compute a batch that is not packed: it has the last word on each call."""
    return implementation(config) == "sdpa" and operations.available("attention", device) and plain()


def is_attention(module: nn.Module) -> bool:
    """Whether this is a decoder's attention that looks up its implementation in its configuration."""
    own = vars(module)
    return "layer_idx" in own and "config" in own and ("is_causal" in own or hasattr(type(module), "is_causal"))


def plain() -> bool:
    """Whether `sdpa` is Transformers' own, of torch's operator. Anyone can put something else in their place."""
    operator: Any = nn.functional.scaled_dot_product_attention
    own = getattr(_sdpa(), "__module__", "") == "transformers.integrations.sdpa_attention"
    return own and isinstance(operator, BuiltinFunctionType)


def _sdpa() -> Any:
    functions = borrow("transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS")  # models ask it; it may have its own
    return (AttentionInterface() if functions is None else functions)["sdpa"]


class Lookup(Hook):
    """The hooks of a model's attentions. A call with the argument `celora_lengths` uses `attention`."""

    def under(self, module: nn.Module) -> list[Any]:
        """Hook one attention."""
        AttentionInterface.register(ATTENTION, attention)  # under its own name; no existing entry changes
        return [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        ]

    def enters(self, module: Any, args: tuple[Any, ...]) -> None:
        """A forward pre-hook of the decoder, which makes the mask. Ctrl-C in a backward may have left our name."""
        if not torch.compiler.is_compiling() and not is_compiled(module):
            self.settle(module)

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook (with kwargs)."""
        if LENGTHS in kwargs:
            if kwargs[LENGTHS] != ():  # else the configuration names it for the whole call
                use_ours(module.config)
        elif not torch.compiler.is_compiling():
            self.settle(module)

    def after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook (with kwargs) that is always called."""
        if kwargs.get(LENGTHS, ()) != ():
            self.settle(module)

    def settle(self, module: Any) -> None:
        """Name `sdpa` again, also after an interrupted forward."""
        use_sdpa(module.config)


def use_ours(config: Any) -> None:
    """Let a configuration name our attention."""
    borrow(_IMPLEMENTATION).fset(config, ATTENTION)


def names_ours(config: Any) -> bool:
    """Whether a configuration names our attention."""
    return implementation(config) == ATTENTION


def use_sdpa(config: Any) -> None:
    """Let a configuration name `sdpa` again, if it names our attention."""
    if names_ours(config):
        borrow(_IMPLEMENTATION).fset(config, "sdpa")


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    celora_lengths: tuple[int, ...] | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention. In a packed batch each sequence attends only to itself.

    Args:
        query: (B, heads, T, head size); packed, (1, heads, N, head size).
        key: like query, perhaps with fewer heads.
        value: like key.
        celora_lengths: number of tokens of each packed sequence; None for a batch that is not packed. () in a
            compiled decoder, where `cu_seq_lens_q` tells.
        cu_seq_lens_q: (S + 1,) int32, where each of S packed sequences begins, and the end of the last. None where
            no function computes them together.
        max_length_q: number of tokens of the longest, with `cu_seq_lens_q`.
    """
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    sequences = len(query) * (1 if celora_lengths is None else len(celora_lengths))
    tiles = dropout == 0 and _tiles_pay(module, query, key, value, sequences)
    if celora_lengths is None:
        if tiles and _only_causal(module, query, key, attention_mask, **kwargs):
            whole: Tensor = _Tiled.apply(query, key, value, None, scale, _saves_compactly(module))  # type: ignore[no-untyped-call]
            return whole, None
        output: tuple[Tensor, Tensor | None] = _sdpa()(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    if (celora_lengths and sum(celora_lengths) != query.shape[2]) or query.shape[2] != key.shape[2]:
        raise CELoraError(
            f"{query.shape[2]} queries and {key.shape[2]} keys for {sum(celora_lengths)} packed tokens: something "
            "between the batch and the attention changed them. Attach with padding_free=False."
        )
    if isinstance(attention_mask, Tensor) and attention_mask.numel() > 1:
        raise CELoraError(
            "something made an attention mask of its own for a packed batch. Attach with padding_free=False."
        )
    if celora_lengths and tiles:
        packed: Tensor = _Tiled.apply(query, key, value, celora_lengths, scale, _saves_compactly(module))  # type: ignore[no-untyped-call]
        return packed, None
    if dropout == 0 and cu_seq_lens_q is not None and max_length_q is not None:
        together = varlen.attend(module, query, key, value, cu_seq_lens_q, max_length_q, attention_mask, scale)
        if together is not None:
            return together, None
    if not celora_lengths:
        raise CELoraError(
            f"a compiled model has packed batches, and nothing here computes attention of {query.dtype} with heads of "
            f"{query.shape[3]} in one call. Attach with padding_free=False."
        )
    _say_one_by_one(query.device.type, dropout)
    pieces = zip(*(t.split(celora_lengths, dim=2) for t in (query, key, value)), strict=True)
    found = [_sdpa()(module, *piece, None, dropout=dropout, scaling=scaling, **kwargs)[0] for piece in pieces]
    return torch.cat(found, dim=1), None


def _say_one_by_one(kind: str, dropout: float) -> None:
    if kind != "cpu" and kind not in _said:  # not `functools.cache`, of which torch.compile warns
        _said.add(kind)
        warnings.warn(
            f"celora: nothing here computes {'attention with dropout' if dropout else 'the attention'} of all packed "
            f"sequences in one call on {kind}, so each is a call of its own. Many short sequences may be faster with "
            "padding_free=False.",
            stacklevel=2,
        )


def packing_pays(dtype: torch.dtype, device: torch.device, *, masked: bool) -> bool:
    """Whether packing makes attention faster, even if it saves hardly any tokens. Our kernel takes no mask.

    Args:
        masked: whether some token is masked.
    """
    return masked and dtype in _DTYPES and operations.available("attention", device)


def _tiles_pay(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, sequences: int) -> bool:
    """Whether our kernel computes this.

    It does if it can, if it has work for at least half of the threads, and if no dispatch mode is on. In training it
    also computes forwards without gradients, so that both forwards of a checkpoint give the same numbers.
    """
    tensors = (query, key, value)
    if query.dtype not in _DTYPES or any(type(t) is not Tensor or t.dtype != query.dtype for t in tensors):
        return False
    if torch.compiler.is_compiling() or not operations.available("attention", query.device) or in_dispatch_mode():
        return False
    trains = any(t.requires_grad for t in tensors) if torch.is_grad_enabled() else module.training
    batch, heads, tokens, size = query.shape
    kept = (batch, key.shape[1], tokens, size)
    shapes = key.shape == value.shape == kept and size % 32 == 0 and heads % key.shape[1] == 0 and query.numel() > 0
    dense = all(t.stride(-1) == 1 for t in tensors)
    return trains and shapes and dense and 2 * sequences * key.shape[1] >= torch.get_num_threads()


def _saves_compactly(module: nn.Module) -> bool:
    """Whether this attention's forward is celora's, which is to save activations in fewer bits."""
    own = vars(module).get("forward")
    return isinstance(own, OwnForward) and own.switch.saves_compactly


def _only_causal(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    output_attentions: bool = False,
    **_: Any,
) -> bool:
    """Whether this is plain causal attention: each token attends to itself and all tokens before it."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = position_bias is None and softcap is None and not output_attentions
    return bool(causal and plain and mask is None and query.shape[2] == key.shape[2] > 1)


class _Tiled(torch.autograd.Function):
    """Causal attention by our kernel: (B, heads, T, d) to (B, T, heads, d).

    Each sequence attends to itself; by default each row is one sequence. If `compactly`, inputs are saved in
    bfloat16, and the backward computes the output again. The output of other inputs would put the softmax off, all the
    more where keys have a few very large numbers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[int, ...] | None,
        scale: float,
        compactly: bool,
    ) -> Tensor:
        lengths = (query.shape[2],) if lengths is None else lengths
        pieces = [(end - n, n) for n, end in zip(lengths, accumulate(lengths), strict=True)]
        sequences = [(row, *piece) for row in range(len(query)) for piece in pieces]
        sequences.sort(key=lambda sequence: -sequence[2])  # the longest first, so that threads end at about one time
        ctx.sequences, ctx.scale = torch.tensor(sequences, device="cpu"), scale
        output, logs = operations.attention(query, key, value, ctx.sequences, scale=scale)
        if compactly:
            ctx.save_for_backward(query.bfloat16(), key.bfloat16(), value.bfloat16())
        else:
            ctx.save_for_backward(query, key, value, output, logs)
        return output

    @staticmethod
    @untraced
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad if type(grad) is Tensor and grad.stride(-1) == 1 else ready(grad)
        query, key, value, *known = ctx.saved_tensors
        if not known:
            query, key, value = (t.to(grad.dtype) for t in (query, key, value))
            known = operations.attention(query, key, value, ctx.sequences, scale=ctx.scale)
        output, logs = known
        found = operations.attention_backward(grad, query, key, value, output, logs, ctx.sequences, scale=ctx.scale)
        return *found, None, None, None
