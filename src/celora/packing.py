"""Batches without padding: the tokens of all sequences in one row, each attending to its own sequence only.

A padded batch spends every layer on tokens that nobody looks at; so does, in a causal model, every token after the last
one whose successor has a label. Both are left out before the model sees the batch, and nothing that is learnt changes.
Attention is computed sequence by sequence, as FlashAttention's variable-length kernels do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from celora.errors import CELoraError
from celora.select import grain

ATTENTION = "celora_packed_sdpa"
_LENGTHS = "celora_lengths"

# Decoders in which tokens meet in causal attention alone, and whose layers hand extra arguments on to it.
MODELS = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma3_text", "granite", "olmo2", "phi3", "cohere"}
)
_LEAST_SAVING = 0.05  # of the tokens; for less, the varying shapes are not worth it


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
    if not ok or not total or total > (1 - _LEAST_SAVING) * rows * columns:
        return None
    config: Any = model.config
    ours = config._attn_implementation == ATTENTION
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
        return inputs | {"attention_mask": place.new_ones(1, 1, 1, 1, dtype=torch.bool), _LENGTHS: lengths}
    ends = torch.tensor([0, *lengths]).cumsum(0).to(input_ids.device, torch.int32)
    return inputs | {
        "attention_mask": None,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def cannot_pack(model: nn.Module) -> str:
    """Why batches of `model` have to stay padded, or ''."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in MODELS:
        return f"not known to be right for {kind!r} models"
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in ("sdpa", "flash_attention_2", "flash_attention_3", ATTENTION):
        return f"not with attn_implementation={implementation!r}"
    return ""


def register() -> None:
    """Make the attention known to Transformers, under a name of its own; nothing that exists is changed."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    celora_lengths: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' scaled dot-product attention, of each packed sequence by itself where there are any.

    Args:
        query, key, value: (B, heads, T, head size); packed, (1, heads, N, head size).
        celora_lengths: of the packed sequences; None for a batch that is not packed.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if celora_lengths is None:
        output: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, *args, **kwargs
        )
        return output
    if sum(celora_lengths) != query.shape[2] or query.shape[2] != key.shape[2]:
        raise CELoraError(
            f"{query.shape[2]} queries and {key.shape[2]} keys for {sum(celora_lengths)} packed tokens: something "
            "between the batch and the attention changed them. Attach with padding_free=False."
        )
    pieces = zip(*(t.split(celora_lengths, dim=2) for t in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *of, None, *args, **kwargs)[0] for of in pieces], dim=1), None
