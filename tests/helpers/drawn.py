"""One drawn case of training: a small model, an adapter, batches, and actions of a user. hypothesis simplifies it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from drawn_acts import ACTS
from drawn_models import EXPERTS, FAMILIES, IMAGE, NO_SDPA, VISUAL, VOCAB

Pairs = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Case:
    """What is trained, and how. Its repr is a call that makes the same case.

    Attributes:
        config: changes to the family's configuration.
        lora: fields of LoraConfig, and those of `drawn_models.adapt`.
        acts: (name, when, which part): before celora is attached (0), or after this many rounds.
        mask: none, ones, right, left, holes, empty (a row without tokens), packed (by positions), block (4-D), both
            (4-D, two-sided).
        labels: all, prompt, some, last, first, none, absent, or anywhere (on padding, too).
        extra: arguments of every training call.
        between: what happens between two rounds.
        items: the type of `num_items_in_batch`.
    """

    family: str = "llama"
    config: Pairs = ()
    attention: str = "sdpa"
    dtype: str = "float32"
    seed: int = 0
    lora: Pairs = ()
    acts: tuple[tuple[str, int, int], ...] = ()
    rows: int = 2
    width: int = 9
    mask: str = "none"
    mask_dtype: str = "int64"
    labels: str = "all"
    positions: str = "none"
    embeds: str = ""
    extra: Pairs = ()
    call: str = "peft"
    attached_to: str = "peft"
    accumulate: int = 1
    items: str = ""
    smoothing: str = ""
    autocast: bool = False
    backward: str = "backward"
    between: tuple[str, ...] = ()

    def __repr__(self) -> str:
        changed = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return f"Case({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis prints it this way


BOOL = st.booleans()


def rarely(strategy: st.SearchStrategy[Any], default: Any, odds: int = 4) -> st.SearchStrategy[Any]:
    """Mostly the default. Once in `odds` times, a drawn value."""
    return st.integers(0, odds - 1).flatmap(lambda n: strategy if n == odds - 1 else st.just(default))


def some_of(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Pairs]:
    """A few of the fields: none to three."""
    chosen = st.lists(st.sampled_from(sorted(fields)), max_size=3, unique=True)
    return chosen.flatmap(lambda names: st.tuples(*(st.tuples(st.just(name), fields[name]) for name in names)))


CONFIG = some_of(
    tie_word_embeddings=BOOL,
    num_hidden_layers=st.just(1),
    num_key_value_heads=st.sampled_from([1, 4]),
    attention_bias=st.just(True),
    mlp_bias=st.just(True),
    hidden_act=st.sampled_from(["gelu", "relu", "gelu_pytorch_tanh", "silu"]),
    use_cache=BOOL,
)
# Settings that only one family's configuration has.
FAMILY_CONFIG: dict[str, st.SearchStrategy[Pairs]] = {
    "mistral": some_of(sliding_window=st.sampled_from([4, 6, 100])),
    "qwen2": some_of(use_sliding_window=st.just(True), sliding_window=st.just(5), max_window_layers=st.just(1)),
    "qwen3": some_of(use_sliding_window=st.just(True), sliding_window=st.just(5), max_window_layers=st.just(1)),
    "phi3": some_of(sliding_window=st.just(5), partial_rotary_factor=st.just(0.5), resid_pdrop=st.just(0.2)),
    "granite": some_of(embedding_multiplier=st.just(3.0), logits_scaling=st.just(0.5)),
    "cohere": some_of(logit_scale=st.sampled_from([1.0, 0.0625]), use_qk_norm=st.just(True)),
    "gemma2": some_of(final_logit_softcapping=st.sampled_from([None, 2.0]), sliding_window=st.just(100)),
    "gemma3_text": some_of(
        final_logit_softcapping=st.just(2.0), use_bidirectional_attention=st.just(True), sliding_window=st.just(100)
    ),
    "gemma3": some_of(final_logit_softcapping=st.just(2.0)),
    "gpt2": some_of(scale_attn_by_inverse_layer_idx=st.just(True), reorder_and_upcast_attn=st.just(True)),
    "mixtral": some_of(output_router_logits=st.just(True), sliding_window=st.just(5)),
    "qwen2_moe": some_of(output_router_logits=st.just(True), norm_topk_prob=st.just(True)),
    "recurrent_gemma": some_of(logits_soft_cap=st.sampled_from([2.0, 5.0])),
    "opt": some_of(do_layer_norm_before=st.just(False), word_embed_proj_dim=st.just(16)),
}
LORA = some_of(
    r=st.sampled_from([1, 8]),
    lora_alpha=st.sampled_from([1, 32]),
    lora_dropout=st.sampled_from([0.3, 0.5]),
    targets=st.sampled_from(["one", "attention", "mlp", "last", "head"]),
    use_rslora=st.just(True),
    use_dora=st.just(True),
    bias=st.sampled_from(["lora_only", "all"]),
    lora_bias=st.just(True),
    init_lora_weights=st.just(True),
    second=st.sampled_from(["idle", "chosen", "both"]),
    layers_to_transform=st.just((0,)),
    modules_to_save=st.sampled_from([("lm_head",), ("embed_tokens",)]),
    trainable_token_indices=st.just((3, 4)),
    kept_dtype=BOOL,
    rank_pattern=st.just((("v_proj", 2), ("c_attn", 6))),
    layer_replication=st.just(((0, 2), (1, 2))),
    adapter_dtype=st.just("bfloat16"),
)
EXTRA = some_of(
    use_cache=BOOL,
    output_hidden_states=BOOL,
    output_attentions=BOOL,
    return_dict=BOOL,
    is_causal=st.just(False),
    logits_to_keep=st.sampled_from([0, 1, 3]),
    shift_labels=st.just("given"),
    ignore_index=st.just(0),
    token_type_ids=st.just("given"),
    output_router_logits=st.just(True),
)
BETWEEN = ("evaluate", "no_grad", "generate", "predict", "copy", "attach", "reattach", "saliency", "state", "disabled")

CALLS = ("tuner", "causal", "positional", "checkpointed", "counted", "offloaded", "functional")


def fits(case: Case) -> bool:
    """Whether plain PEFT might train this case. Only a trial tells for sure."""
    names = dict(case.extra)
    causal = case.family not in ("bert", "t5")
    wide = case.width >= (6 if case.family in VISUAL else 1)
    copies = "layer_replication" in dict(case.lora)
    return (
        wide
        and (case.family in ("llama", "mistral") or not copies)
        and (causal or not ({"logits_to_keep", "shift_labels", "is_causal"} & names.keys()))
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A case that is plain in most ways, and unusual in a few."""
    family = draw(st.sampled_from(list(FAMILIES)))
    changes = draw(rarely(CONFIG, (), 3))
    if family in FAMILY_CONFIG:
        changes = tuple(dict(changes + draw(rarely(FAMILY_CONFIG[family], (), 2))).items())
    eager = family in NO_SDPA or draw(rarely(st.just(True), False, 6))
    double = [] if family in EXPERTS else ["float64"]  # no kernel multiplies experts in float64
    dtype = draw(st.sampled_from(["float32"] * 5 + ["bfloat16"] * 2 + double))
    lora = dict(draw(rarely(LORA, (), 2)))
    if "layers_to_transform" in lora:
        lora.setdefault("targets", "attention")
    act = st.tuples(st.sampled_from(list(ACTS)), st.integers(0, 2), st.integers(0, 5))
    # Masks and labels that celora packs are listed more than once, so they are drawn more often.
    masks = ["none", "right", "left", "ones", "right", "left", "holes", "empty", "packed", "block", "both"]
    labels = ["all", "prompt", "some", "all", "prompt", "last", "first", "anywhere", "none", "absent"]
    acts = tuple(draw(st.lists(act, max_size=3)))
    smoothing = draw(rarely(st.sampled_from(["trainer", "celora"]), "", 8))
    if any(name == "hook model" for name, *_ in acts):
        smoothing = (
            smoothing and "trainer"
        )  # the hook changes the model's own loss, and Trainer's smoother computes another one
    items = draw(rarely(st.sampled_from(["int", "tensor"]), "", 4))
    return Case(
        family=family,
        config=changes,
        attention="eager" if eager else "sdpa",
        dtype=dtype,
        seed=draw(st.integers(0, 3)),
        lora=tuple(lora.items()),
        acts=acts,
        rows=draw(st.sampled_from([2, 1, 3])),
        width=draw(st.sampled_from([9, 1, 2, 6, 13, 20])),
        mask=draw(st.sampled_from(masks)),
        mask_dtype=draw(rarely(st.sampled_from(["bool", "float32"]), "int64", 6)),
        labels=draw(st.sampled_from(labels)),
        positions=draw(rarely(st.sampled_from(["usual", "shifted", "from mask"]), "none", 5)),
        embeds=draw(rarely(st.sampled_from(["frozen", "grad"]), "", 8)),
        extra=draw(rarely(EXTRA, (), 4)),
        call=draw(rarely(st.sampled_from(CALLS), "peft", 4)),
        attached_to=draw(rarely(st.sampled_from(["tuner", "wrapper"]), "peft", 8)),
        accumulate=draw(st.sampled_from([1, 1, 2])),
        items=items if smoothing != "celora" else "",  # Trainer's smoother does not divide by it
        smoothing=smoothing,
        autocast=draw(rarely(st.just(True), False, 8)),
        backward=draw(rarely(st.sampled_from(["grad", "twice", "two calls", "scaled"]), "backward", 5)),
        between=tuple(draw(st.lists(st.sampled_from(BETWEEN), max_size=2, unique=True))),
    )


def make_batch(case: Case, number: int) -> dict[str, Any]:
    """The arguments of one call, with tokens; embeddings may replace them later."""
    g = torch.Generator().manual_seed(100 * case.seed + number)
    rows, width = case.rows, case.width
    tokens = torch.randint(3, VOCAB - 2, (rows, width), generator=g)
    if case.family in VISUAL:
        tokens[:, 1:5] = IMAGE
    place = torch.arange(width).expand(rows, width)
    lengths = torch.randint(1 if case.family not in VISUAL else 6, width + 1, (rows, 1), generator=g)
    there = torch.ones(rows, width, dtype=torch.bool)
    if case.mask in ("right", "left"):
        there = place < lengths if case.mask == "right" else place >= width - lengths
    elif case.mask == "holes":
        there = torch.rand(rows, width, generator=g) < 0.7
        there[:, 0] = True
    elif case.mask == "empty":
        there[-1] = rows == 1
    batch: dict[str, Any] = {"input_ids": tokens}
    if case.mask in ("ones", "right", "left", "holes", "empty"):
        batch["attention_mask"] = there.to(getattr(torch, case.mask_dtype))
    labels = tokens.masked_fill((~there & (case.labels != "anywhere")) | (tokens == IMAGE), -100)
    if case.labels == "prompt":
        labels = labels.masked_fill(place < width // 2, -100)
    elif case.labels == "some":
        labels = labels.masked_fill(torch.rand(rows, width, generator=g) < 0.5, -100)
    elif case.labels in ("last", "first"):
        labels = labels.masked_fill(place != (width - 1 if case.labels == "last" else 1), -100)
    elif case.labels == "none":
        labels = torch.full_like(labels, -100)
    if case.labels != "absent":
        batch["labels"] = labels
    _place(case, batch, there, place)
    if case.family == "bert":
        batch["labels"] = tokens[:, 0] % 3
    if case.family in VISUAL:
        batch["pixel_values"] = torch.randn(rows, 3, 8, 8, generator=g).to(getattr(torch, case.dtype))
    if case.family == "gemma3":
        batch["token_type_ids"] = (tokens == IMAGE).long()
    for name, value in case.extra:
        batch[name] = value
        if name == "shift_labels":
            batch[name] = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
        elif name == "token_type_ids":
            batch[name] = torch.zeros_like(tokens)
    return batch


def _place(case: Case, batch: dict[str, Any], there: Tensor, place: Tensor) -> None:
    """Add positions and four-dimensional masks to the batch."""
    width = case.width
    if case.mask == "packed":
        batch["position_ids"] = place % max(2, width // 2)
    elif case.positions == "usual":
        batch["position_ids"] = place.clone()
    elif case.positions == "shifted":
        batch["position_ids"] = place + 3
    elif case.positions == "from mask":
        batch["position_ids"] = (there.long().cumsum(1) - 1).clamp(min=0)
    if case.mask in ("block", "both"):
        seen = torch.ones(width, width, dtype=torch.bool)
        half = torch.arange(width) // max(1, width // 2)
        seen = (half[:, None] == half[None]) & (seen.tril() if case.mask == "block" else seen)
        full = seen.expand(case.rows, 1, width, width)
        if case.attention == "eager" or case.mask_dtype == "float32":
            dtype = getattr(torch, case.dtype)
            full = torch.zeros(full.shape, dtype=dtype).masked_fill(~full, torch.finfo(dtype).min)
        batch["attention_mask"] = full.clone()
