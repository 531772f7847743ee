"""Batches without padding: the tokens of all sequences in one row, each attending to its own sequence only.

A padded batch spends every layer on tokens that nobody looks at; so does, in a causal model, every token after the last
one whose successor has a label. Both are left out before the model sees the batch, and nothing that is learnt changes.
Attention is computed sequence by sequence (`celora.attention`), or by FlashAttention's variable-length kernels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from celora.attention import ATTENTION, LENGTHS, packing_pays
from celora.select import grain

# Decoders in which tokens meet in causal attention alone, and whose layers hand extra arguments on to it.
MODELS = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma3_text", "granite", "olmo2", "phi3", "cohere"}
)
_LEAST_SAVING = 0.05  # of the tokens; for less, only a faster attention is worth the varying shapes


def pack(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    next_labels: Tensor,
) -> dict[str, Any] | None:
    """A batch of B sequences of up to T tokens as one row of N tokens; None if it is better left as it is.

    Args:
        model: that will get it; `cannot_pack` has said nothing against it.
        input_ids: (B, T).
        attention_mask: (B, T), 1 for tokens and 0 for padding on either side, or None for no padding.
        position_ids: (B, T) or None for 0 ... T-1.
        next_labels: (B, T), the label of each token's successor, -100 for none.

    Returns:
        What replaces arguments of the model's forward, and `index`: where each token was in the flattened batch, (N,).
    """
    rows, columns = input_ids.shape
    if columns > _longest(model.config):
        return None
    place = torch.arange(columns, device=input_ids.device).expand(rows, columns)
    labelled = next_labels != -100
    kept = place <= torch.where(labelled, place, -1).amax(1, keepdim=True)
    whole = kept.new_ones(())
    if attention_mask is not None:
        mask = nn.functional.pad(attention_mask, (1, 0))
        kept = kept & (attention_mask != 0)
        # Each sequence in one piece, and no label to be predicted from padding.
        whole = ((mask[:, 1:] > mask[:, :-1]).sum(1) <= 1).all() & ~(labelled & ~kept).any()
    # Waits for the device once, before it has anything to do.
    *counted, ok = torch.cat([kept.sum(1), whole[None].to(torch.int64)]).tolist()
    lengths, total = tuple(n for n in counted if n), sum(counted)
    if not ok or not total:
        return None
    config: Any = model.config
    ours = config._attn_implementation == ATTENTION
    if total > (1 - _LEAST_SAVING) * rows * columns and not (
        ours and packing_pays(_dtype(model), max(lengths), attention_mask, input_ids.device)
    ):
        return None
    window = getattr(config, "sliding_window", None)
    if ours and window is not None and max(lengths) > window:
        return None  # full causal attention, which is what each sequence gets, would be another model's
    index = kept.flatten().nonzero()[:, 0]
    # A few repetitions of the last token, which nothing before them sees: shapes that come again are faster.
    extra = -total % grain(total) if input_ids.device.type == "cpu" else 0
    lengths = (*lengths[:-1], lengths[-1] + extra)
    padded = torch.cat([index, index[-1:].expand(extra)])
    inputs: dict[str, Any] = {
        "index": index,
        "input_ids": input_ids.flatten()[padded][None],
        "position_ids": (place if position_ids is None else position_ids).flatten()[padded][None],
    }
    if ours:  # a mask of four dimensions is handed on as it is, and ours looks at none
        return inputs | {"attention_mask": place.new_ones(1, 1, 1, 1, dtype=torch.bool), LENGTHS: lengths}
    ends = torch.tensor([0, *lengths]).cumsum(0).to(input_ids.device, torch.int32)
    return inputs | {
        "attention_mask": None,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def _longest(config: Any) -> float:
    """The number of tokens from which on the rotary embedding of each depends on how many there are."""
    found = getattr(config, "rope_parameters", None) or {}
    for rope in (found, *(of for of in found.values() if isinstance(of, dict))):  # one for all layers, or for each kind
        if rope.get("rope_type") in ("dynamic", "longrope"):
            return float(min(rope.get("original_max_position_embeddings", math.inf), config.max_position_embeddings))
    return math.inf


def _dtype(model: Any) -> torch.dtype:
    """The dtype that the model works in."""
    autocast = torch.is_autocast_enabled("cpu")
    dtype: torch.dtype = torch.get_autocast_dtype("cpu") if autocast else model.dtype
    return dtype


def cannot_pack(model: nn.Module) -> str:
    """Why batches of `model` have to stay padded, or ''."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in MODELS:
        return f"not known to be right for {kind!r} models"
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in ("sdpa", "flash_attention_2", "flash_attention_3", ATTENTION):
        return f"not with attn_implementation={implementation!r}"
    # PEFT's layer_replication copies it, so that such a layer would not hear which attention it is to use.
    if any(getattr(m, "config", config) is not config for m in model.modules() if hasattr(m, "layer_idx")):
        return "some of its layers have a configuration of their own"
    if getattr(config, "use_bidirectional_attention", None):
        return "its tokens attend to later ones"
    adapters = [of for m in model.modules() for of in getattr(m, "lora_variant", {}).values()]
    if any(type(of).__name__.startswith("ALora") for of in adapters):
        return "aLoRA begins at a token of each row"
    return ""
