"""The table of families of language models, one row for each. docs/develop/new-family.md says how to add one.

A family is the `model_type` of a configuration. A row has two kinds of facts:

- Facts that no trial can show: with which attentions batches may be packed. A model keeps its padding if its family has
  no row, or if it has another attention.
- Facts to try: the names by which a configuration scales and caps logits, and the kinds of norms, gates and rotations.
  celora tries the facts of all rows (`column`) on every model, even if its own family has no row. It uses what the
  trial confirms (`recognise`, `passes`). So these facts can make celora faster, but they cannot change a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Norm:
    """An RMS norm: `y = (offset + weight) x / sqrt(mean x^2 + eps)`, computed in float32.

    Attributes:
        rounds: whether `x / sqrt(...)` is rounded to the dtype of x before it is multiplied.
    """

    offset: float = 0.0
    rounds: bool = False


@dataclass(frozen=True)
class Gate:
    """A gated block, `down(silu(gate(x)) up(x))`: the names of its parts."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"


ATTENTIONS = ("sdpa", "flash_attention_2", "flash_attention_3")  # they can be told where sequences end
_TURN = "apply_rotary_pos_emb"  # y = q cos + (-q2, q1) sin, of q = (q1, q2)


@dataclass(frozen=True)
class Family:
    """One family. The defaults are Llama's, except for `packs_with`.

    Attributes:
        name: `model_type` of the configuration.
        packs_with: the values of `attn_implementation` with which batches may be packed. In such a decoder tokens
            interact only in causal attention, and layers pass extra arguments on to the attention.
        window: the field of the configuration with the number of tokens that a token attends to, if there is one.
        scale: the field with the number by which logits, or hidden states before the head, are multiplied or divided;
            '' for none.
        cap: the field with the c of `c tanh(logits / c)`; '' for none.
        norm: its RMS norms; None for another norm.
        gate: its gated blocks; None for others.
        rotation: the name of the function that turns queries and keys by halves; '' for another rotation.
    """

    name: str
    packs_with: tuple[str, ...] = ()
    window: str = "sliding_window"
    scale: str = ""
    cap: str = ""
    norm: Norm | None = Norm(rounds=True)
    gate: Gate | None = Gate()
    rotation: str = _TURN


def _head(name: str, *, scale: str = "", cap: str = "", window: str = "sliding_window") -> Family:
    """A family whose row has facts about its head only."""
    return Family(name, window=window, scale=scale, cap=cap, norm=None, gate=None, rotation="")


_GEMMA = Norm(offset=1.0)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", ATTENTIONS),
        Family("mistral", ATTENTIONS),
        Family("qwen2", ATTENTIONS),
        Family("qwen3", ATTENTIONS),
        Family("smollm3", ATTENTIONS),
        Family("granite", ATTENTIONS, scale="logits_scaling"),
        Family("olmo2", ATTENTIONS, norm=Norm()),
        Family("phi3", ATTENTIONS, gate=None),
        Family("mixtral", ATTENTIONS),
        Family("qwen3_moe", ATTENTIONS),
        Family("olmo", ATTENTIONS, norm=None),
        Family("olmo3", ATTENTIONS, norm=Norm()),
        Family("starcoder2", ATTENTIONS, norm=None, gate=None),
        Family("phi", ATTENTIONS, norm=None, gate=None),
        Family("glm", ATTENTIONS, gate=None, rotation=""),
        Family("glm4", ATTENTIONS, gate=None, rotation=""),
        Family("ministral3", ATTENTIONS),
        Family("seed_oss", ATTENTIONS),
        Family("exaone4", ATTENTIONS),
        Family("arcee", ATTENTIONS, gate=None),
        Family("ernie4_5", ATTENTIONS, rotation=""),
        Family("gemma", ATTENTIONS, norm=_GEMMA, gate=None),
        Family("gemma2", cap="final_logit_softcapping", norm=_GEMMA, gate=None),
        Family("gemma3_text", ATTENTIONS, cap="final_logit_softcapping", norm=_GEMMA, gate=None),
        Family("cohere", ATTENTIONS, scale="logit_scale", norm=None, rotation=""),
        Family("cohere2", scale="logit_scale", norm=None, rotation=""),
        _head("recurrent_gemma", cap="logits_soft_cap", window="attention_window_size"),
        _head("falcon_h1", scale="lm_head_multiplier"),
        _head("muse_glimmer", scale="output_multiplier", cap="final_logit_softcapping"),
        _head("inkling_text", scale="logits_mup_width_multiplier"),
        _head("xlstm", cap="output_logit_soft_cap"),
    )
}


def family_of(config: Any) -> Family | None:
    """The row for the model with this configuration, or None."""
    return FAMILIES.get(getattr(config, "model_type", ""))


def column(name: Literal["scale", "cap", "norm", "gate", "rotation"]) -> list[Any]:
    """All families' values in this column, each once, in the table's order. They are tried on every model."""
    return list(dict.fromkeys(value for family in FAMILIES.values() if (value := getattr(family, name))))
