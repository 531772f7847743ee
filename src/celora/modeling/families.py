"""What is known of each family of language models: one row a family. docs/develop/new-family.md says how to add one.

A family is what its configuration calls `model_type`. A row holds two kinds of knowledge:

- What no trial can tell: with which attentions the batches of such a model may be packed. A model whose family has no
  row, or none of these attentions, keeps its padding.
- What to try: by which names a configuration scales and caps logits, and of what kinds norms, gates and rotations are.
  celora tries what any row names (`column`) on every model, whether or not its own family has a row, and uses what the
  trial confirms (`recognise`, `passes`). So a row can make celora faster, and never make it wrong.
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


ATTENTIONS = ("sdpa", "flash_attention_2", "flash_attention_3")  # those that celora can tell where sequences end
_TURN = "apply_rotary_pos_emb"  # y = q cos + (-q2, q1) sin, of q = (q1, q2)


@dataclass(frozen=True)
class Family:
    """One family. What stands here by default, except for `packs_with`, is Llama's.

    Attributes:
        name: `model_type` of the configuration.
        packs_with: the values of `attn_implementation` with which batches may be packed. That takes a decoder in which
            tokens meet in causal attention alone, and whose layers hand extra arguments on to it.
        window: where the configuration has the number of tokens that one attends to, if it has one.
        scale: where the configuration has the number that logits, or hidden states before the head, are multiplied with
            or divided by; '' for no such number.
        cap: where the configuration has the c of `c tanh(logits / c)`; '' for no such number.
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
    """A family of which only the head is known."""
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
    """The row of the model with this configuration, if there is one."""
    return FAMILIES.get(getattr(config, "model_type", ""))


def column(name: Literal["scale", "cap", "norm", "gate", "rotation"]) -> list[Any]:
    """What any family has in this column, each once and in the table's order: what is to be tried on a model."""
    return list(dict.fromkeys(value for family in FAMILIES.values() if (value := getattr(family, name))))
