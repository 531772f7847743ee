"""Batches without padding: all sequences are in one row, and each token attends to its own sequence only.

Padding costs time in every layer, and nobody reads its results. In a causal model the same is true of all tokens after
the last one whose successor has a label. celora leaves both out before the model sees the batch. Gradients stay the
same. Attention is computed sequence by sequence (`celora.modeling.attention`), or for all of them in one call
(`celora.modeling.varlen`; FlashAttention where the model names it).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from celora.borrowed import borrow
from celora.modeling import varlen
from celora.modeling.attention import LENGTHS, implementation, packing_pays, plain
from celora.modeling.compiled import is_compiled
from celora.modeling.families import family_of
from celora.modeling.onlookers import unknown_forward
from celora.modeling.others import name_of
from celora.modeling.trial import watched_everywhere
from celora.numerics.select import grain

_LEAST_SAVING = 0.05  # share of the tokens; below, varying shapes cost more than they save, unless attention gains


def measure(labelled: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which tokens a packed batch keeps, (B, T) bool, and the numbers that `pack` needs, (B + 2,) int64.

    Args:
        labelled: (B, T), whether a token's successor has a label.
        attention_mask: (B, T), 1 for tokens and 0 for padding on either side, or None for no padding.

    It does not wait for an accelerator. The caller reads the numbers together with its own.
    """
    place = torch.arange(labelled.shape[1], device=labelled.device)
    kept = place <= torch.where(labelled, place, -1).amax(1, keepdim=True)
    whole, masked = kept.new_ones(()), kept.new_zeros(())
    if attention_mask is not None:
        mask = nn.functional.pad(attention_mask, (1, 0))
        kept = kept & (attention_mask != 0)
        # Each sequence is in one piece, and no label is predicted from padding.
        whole = ((mask[:, 1:] > mask[:, :-1]).sum(1) <= 1).all() & ~(labelled & ~kept).any()
        masked = (attention_mask == 0).any()
    return kept, torch.cat([whole[None], masked[None], kept.sum(1)])


BEYOND_WINDOW = (
    "padding stays in batches with a row longer than the sliding window of {} tokens; with flash_attention_2 it is "
    "left out."
)


def pack(
    model: Any, input_ids: Tensor, position_ids: Tensor | None, kept: Tensor, numbers: list[int]
) -> dict[str, Any] | None:
    """Put a batch of B sequences of up to T tokens into one row of N tokens; None if packing does not help.

    Args:
        model: the model that gets the batch; `cannot_pack` must have found no reason against it.
        input_ids: (B, T).
        position_ids: (B, T) or None for 0 ... T-1.
        kept: which tokens to keep, from `measure`.
        numbers: the numbers from `measure`, as a list.

    Returns:
        Arguments of the model's forward that replace those of the batch.
    """
    rows, columns = input_ids.shape
    whole, masked, *counted = numbers
    lengths, total = tuple(n for n in counted if n), sum(counted)
    if not whole or not total or not _rotates_alike(model.config, position_ids, columns):
        return None
    config, decoder = model.config, model.base_model
    ours, device = implementation(config) == "sdpa", input_ids.device
    compiled = ours and is_compiled(decoder)
    if compiled and not varlen.compiles(config, device, _dtype(model)):
        return None
    if any(is_compiled(module) for module in _inside(decoder) if module is not decoder):
        return None  # each shape is another graph, and older torch does not see there which attention is named
    if total > (1 - _LEAST_SAVING) * rows * columns and not (
        ours and packing_pays(_dtype(model), device, masked=bool(masked))
    ):
        return None
    if window_exceeded(config, numbers) is not None:
        return None  # packed sequences get full causal attention, which ignores the window
    index = places(kept.flatten(), total)
    # Repeat the last token a few times. No other token sees the copies, and a shape seen before is faster.
    extra = -total % grain(total) if device.type == "cpu" or compiled else 0
    lengths = (*lengths[:-1], lengths[-1] + extra)
    padded = torch.cat([index, index[-1:].expand(extra)])
    position = torch.arange(columns, device=device).expand(rows, columns)
    inputs: dict[str, Any] = {
        "input_ids": input_ids.flatten()[padded][None],
        "position_ids": (position if position_ids is None else position_ids).flatten()[padded][None],
    }
    if ours and not varlen.computes(config, device, _dtype(model)):
        return inputs | {LENGTHS: lengths, "attention_mask": _ignored(index)}
    counts = kept.sum(1)
    if compiled:  # no number that another batch of as many tokens would not have
        longest, lengths = 1 << (max(lengths) - 1).bit_length(), ()
    else:
        longest, counts = max(lengths), counts[places(counts > 0, len(lengths))]
    ends = counts.cumsum(0)
    ends[-1:] += extra
    begins = nn.functional.pad(ends, (1, 0)).to(torch.int32)
    inputs |= {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": longest, "max_length_k": longest}
    if not ours:
        return inputs | {"attention_mask": None}
    mask = varlen.block_mask(begins, total + extra, _dtype(model), varlen.head_size(config))
    return inputs | {LENGTHS: lengths, "attention_mask": _ignored(index) if mask is None else mask}


def window_exceeded(config: Any, numbers: Sequence[int]) -> int | None:
    """The sliding window of our attention that a row of this batch is longer than; None if there is none."""
    family = family_of(config)
    window: int | None = None if family is None else getattr(config, family.window, None)  # 0 is none, too
    ours = implementation(config) == "sdpa"
    return window if ours and window and max(numbers[2:], default=0) > window else None


def _ignored(index: Tensor) -> Tensor:
    """A mask of four dimensions, which Transformers passes on. Our attention ignores it; any other refuses integers."""
    return index.new_ones(1, 1, 1, 1)


def places(mask: Tensor, count: int) -> Tensor:
    """The `count` places where a flat mask is true. Unlike `nonzero`, this does not wait for an accelerator."""
    return torch.searchsorted(mask.cumsum(0), torch.arange(1, count + 1, device=mask.device))


def _rotates_alike(config: Any, position_ids: Tensor | None, columns: int) -> bool:
    """Whether rotary embeddings stay the same if the last tokens are left out.

    Some depend on the largest position. What is given as `position_ids` is not looked at: the host would wait for it.
    """
    longest = _longest(config)
    return longest == math.inf or (position_ids is None and columns < longest)


def _longest(config: Any) -> float:
    """The number of tokens in a row from which on rotary embeddings depend on that number."""
    # Before version 5 of Transformers, the second name, and the original length stands beside it.
    found = getattr(config, "rope_parameters", None) or vars(config).get("rope_scaling") or {}
    original = vars(config).get("original_max_position_embeddings", math.inf)
    # One setting for all layers, or one for each kind of layer.
    for rope in (found, *(kind for kind in found.values() if isinstance(kind, dict))):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            known = rope.get("original_max_position_embeddings", original)
            return float(min(known, config.max_position_embeddings))
    return math.inf


def _dtype(model: Any) -> torch.dtype:
    """The dtype of the model's activations."""
    kind = model.device.type
    dtype: torch.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype
    return dtype


def cannot_pack(model: nn.Module, look: Callable[[nn.Module], str] = lambda module: "") -> str:
    """Why batches of `model` now keep their padding; '' if they need not. `look` may find a reason in a module."""
    config = getattr(model, "config", None)
    family = family_of(config)
    if family is None or not family.packs_with:
        return f"not known to be right for {getattr(config, 'model_type', type(model).__name__)!r} models"
    name = implementation(config)
    if name not in family.packs_with:
        return f"not with attn_implementation={name!r}"
    if watched_everywhere():
        return "hooks of all modules may depend on a batch's shape"
    if name == "sdpa" and not plain():
        return "attn_implementation='sdpa' is not Transformers' own"
    if by := other_masks(model):
        return f"{by} makes its attention mask"
    # A family that Transformers does not have was entered for a model of one's own, with its forward.
    if type(config).__module__.startswith("transformers.") and (reason := unknown_forward(model)):
        return reason.format(type(model).__name__)
    if getattr(config, "use_bidirectional_attention", None) or not getattr(config, "is_causal", True):
        return _SEE_LATER
    decoder: Any = model.base_model
    for module in _inside(decoder):
        if reason := _objection(module, config) or look(module):
            path = next(path for path, other in decoder.named_modules() if other is module)
            return reason.format(path or "the decoder")
    return ""


def other_masks(model: Any) -> str:
    """The name of what makes the model's attention mask, if it is not Transformers' own; else ''."""
    used = getattr(inspect.unwrap(type(model.base_model).forward), "__globals__", {})
    made_by = [used.get(name) for name in ("create_causal_mask", "create_sliding_window_causal_mask")]
    functions = borrow("transformers.masking_utils:ALL_MASK_ATTENTION_FUNCTIONS") or {}
    found = filter(None, (*made_by, functions.get(implementation(model.config))))
    names = (name_of(getattr(function, "_torchdynamo_orig_callable", function)) for function in found)
    return next((name for name in names if not name.startswith("transformers.")), "")


_SEE_LATER = "its tokens attend to later ones"


# PEFT's variants of LoRA that look at the whole batch, by the beginning of their class's name.
_OF_A_BATCH = {
    "ALora": "aLoRA begins at a token of each row",
    "Velora": "VeLoRA averages over all tokens of a batch",
}


def _objection(module: nn.Module, config: Any) -> str:
    """Why batches keep their padding because of this module, or ''. Each call asks thousands of modules."""
    own = vars(module)
    if "layer_idx" in own:
        # PEFT's layer_replication copies the configuration. Such a layer does not see the attention that celora sets.
        if own.get("config", config) is not config:
            return "some of its layers have a configuration of their own"
        if not own.get("is_causal", getattr(type(module), "is_causal", True)):
            return _SEE_LATER
    if type(module).__module__.startswith("peft.tuners.lily."):
        return "Lily mixes its adapters by a mean over all tokens of a batch"
    if reason := unknown_forward(module):
        return reason
    variants = (type(variant).__name__ for variant in own.get("lora_variant", {}).values())
    return next((why for kind in variants for start, why in _OF_A_BATCH.items() if kind.startswith(start)), "")


def _inside(model: nn.Module) -> Iterator[nn.Module]:
    """Every module of a model, without names: computing names takes longer than all else."""
    waiting = [model]
    while waiting:
        module = waiting.pop()
        yield module
        waiting += [child for child in module._modules.values() if child is not None]
