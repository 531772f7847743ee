"""The configuration: one estimator setting for all layers, and overrides for the layers that a pattern names."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from celora.errors import CELoraError, unknown
from celora.files import inside, read_json, write_text
from celora.numerics.estimators import Settings, estimator_class
from celora.numerics.estimators.base import Factor, Forward, Precision, SavedInput, Selection, check_keep_ratio
from celora.settings.names import CONFIG_NAME

Rank = int | Literal["balanced", "adapter"]


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """The setting of one layer.

    Attributes:
        estimator: `dense`, `columns` (the paper's), `tokens`, `int8`, `fp8`, or the name of one that
            `celora.register_estimator` added.
        keep_ratio: share of the gradient's columns (or tokens) that is kept, 0 < keep_ratio <= 1; 1 is dense. With
            `selection="energy"`, the share of the squared gradient norm; 1 then leaves out only exact zeros.
        rank: rank r0 of the frozen factor. 0 means no factor, `"adapter"` the adapter's rank, `"balanced"` the
            `balanced_rank` of the adapter's rank. The layer's size limits the last two.
        selection, factor, precision, weight_copy, forward: see `celora.numerics.estimators.Settings`.
        saved_input: how a fused adapter saves the layer's input x for `grad_A = (scaling G B)^T x`. `forward` saves x
            as the forward multiplied it: with `forward="int8"` in 8 bits (under torch.compile in x's dtype), else in
            x's dtype. `native` saves it in its dtype beside any forward. `int8` saves it in 8 bits beside any forward:
            a byte a number and, beside an exact forward, reading x once more. `grad_A` then reads
            `x ~= diag(s) q` with `s = max |x[t]| / 127`, so each number of x is off by at most `s / 2`. It needs
            `fused`. On a CPU, a batch of fewer than 96 tokens takes PEFT's own path, which saves x itself.
    """

    estimator: str = "columns"
    keep_ratio: float = 0.5
    rank: Rank = "balanced"
    selection: Selection = "topk"
    factor: Factor = "svd"
    precision: Precision = "native"
    weight_copy: bool = True
    forward: Forward = "exact"
    saved_input: SavedInput = "forward"

    def __post_init__(self) -> None:
        _check_layer(self)


@dataclasses.dataclass(frozen=True)
class CELoraConfig(LayerConfig):
    """How the backward of the frozen layers is estimated.

    Attributes:
        estimator, keep_ratio, rank, ...: the setting of every layer that no override names; see `LayerConfig`.
        refresh_every: optimizer steps from one exact, observed backward to the next (the paper's tau).
        spread: let layers refresh in turns instead of all at once, so that the cost is spread over steps.
        target_error: move each layer's `keep_ratio`, so that its relative error at refreshes stays near this value
            (`celora.runtime.target_error`).
        most_error: the largest relative error at a refresh. A layer above it that keeps the rule's share becomes exact,
            and the head keeps more words (`celora.runtime.ladder`; preset `auto`). Other shares stay as they are.
            celora then also measures each layer once within the first steps.
        overrides: glob on a layer's dotted name (or on its end: `"layers.3.mlp.up_proj"`) -> the fields it changes.
            `"=NAME"` is the layer of that whole name alone. Later entries win over earlier ones.
        synchronise: make all processes that train together select the same, by the gradients of all of them. It takes
            one all-reduce at each refresh, outside backward. Not with `factor="gradient"`.
        seed: seed of the randomised factorisation and of sampling.
        fused: compute a vanilla adapter and its base layer's backward as one autograd function (see
            `celora.modeling.fused`) and, on CPU, RMS norms, gates and rotary embeddings in one pass each (see
            `celora.modeling.passes.known`). With `forward="int8"` on a base in 8 bits, these and attention also save
            activations for backward in fewer bits; on accelerators, norms and gates do.
        labelled_head: while training, compute logits of tokens with a label only (see `celora.numerics.head`). The
            model's output then has a loss and no logits.
        padding_free: leave padding out of training batches (`celora.modeling.packing`); needs `labelled_head`.
        head_keep_ratio: share of the vocabulary that the gradient of the logits is multiplied with, in (0, 1]. 1 is
            exact; less needs `labelled_head`. Words are drawn at random, so that the error averages out.
        head_forward: how logits are computed while training: `exact`, or in 8 bits (`int8`), which needs
            `labelled_head`.
        zero_tokens: leave tokens with a gradient of exactly zero out of the backward of layers that would be dense. In
            the last block, all tokens without a label are such. On a CPU only: an accelerator would have to be waited
            for.

    Raises:
        CELoraError: for a value out of range, an unknown field or an unknown estimator.
    """

    refresh_every: int = 200
    spread: bool = False
    target_error: float | None = None
    most_error: float | None = None
    synchronise: bool = False
    fused: bool = False
    labelled_head: bool = False
    padding_free: bool = False
    zero_tokens: bool = False
    head_keep_ratio: float = 1.0
    head_forward: Forward = "exact"
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_saved_input(self)
        _check_int("refresh_every", self.refresh_every, 1, "Use a large number to refresh only once.")
        _check_int("seed", self.seed, 0, "")
        for name in ("spread", "synchronise", "fused", "labelled_head", "padding_free", "zero_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise CELoraError(f"{name}={getattr(self, name)!r}; expected true or false.")
        if self.padding_free and not self.labelled_head:
            raise CELoraError("padding_free=True needs labelled_head=True: the model's own loss wants whole sequences.")
        if self.head_forward not in get_args(Forward):
            raise unknown("head_forward", str(self.head_forward), get_args(Forward))
        if self.head_forward != "exact" and not self.labelled_head:
            raise CELoraError(f"head_forward={self.head_forward!r} needs labelled_head=True.")
        check_keep_ratio(self.head_keep_ratio, "head_keep_ratio")
        if self.head_keep_ratio < 1 and not self.labelled_head:
            raise CELoraError(f"head_keep_ratio={self.head_keep_ratio} needs labelled_head=True.")
        for name in ("target_error", "most_error"):
            error = getattr(self, name)
            if error is not None and (
                isinstance(error, bool) or not isinstance(error, int | float) or not 0 < error < 1
            ):
                raise CELoraError(f"{name}={error!r}; expected 0 < {name} < 1, or None for a fixed keep_ratio.")
        if self.target_error is not None and self.most_error is not None:
            raise CELoraError("target_error and most_error both move what layers keep; give one of them.")
        if not isinstance(self.overrides, Mapping):
            raise CELoraError(f"overrides={self.overrides!r}; expected a mapping from a layer pattern to settings.")
        overrides = {}
        for pattern, fields in self.overrides.items():
            if not isinstance(pattern, str) or not isinstance(fields, Mapping):
                raise CELoraError(
                    f"override {pattern!r}: {fields!r}; expected a layer pattern with a mapping of settings, "
                    'like {"*.q_proj": {"estimator": "dense"}}.'
                )
            for key in fields:
                if key not in LAYER_FIELDS:
                    raise unknown(f"setting in the override {pattern!r}:", key, LAYER_FIELDS)
            try:
                changed = dataclasses.replace(self.default, **fields)
                _check_uses(changed, fields)
                self._check_saved_input(changed)
            except CELoraError as error:
                raise CELoraError(f"override {pattern!r}: {error}") from None
            overrides[pattern] = dict(fields)
        object.__setattr__(self, "overrides", overrides)

    def _check_saved_input(self, config: LayerConfig) -> None:
        if config.saved_input == "int8" and not self.fused:
            raise CELoraError("saved_input='int8' needs fused=True: PEFT saves the input of its own adapters itself.")

    @property
    def exact_head(self) -> bool:
        """Whether the logits and their gradient are exact."""
        return self.head_keep_ratio == 1 and self.head_forward == "exact"

    def for_layer(self, name: str) -> LayerConfig:
        """The setting of layer `name`: the defaults, changed by each override that matches the name."""
        changes: dict[str, Any] = {}
        for pattern, fields in self.overrides.items():
            if matches(pattern, name):
                changes.update(fields)
        return dataclasses.replace(self.default, **changes)

    @property
    def default(self) -> LayerConfig:
        """The setting of a layer that no override names."""
        return LayerConfig(**{name: getattr(self, name) for name in LAYER_FIELDS})

    def to_dict(self) -> dict[str, Any]:
        """Plain values only; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CELoraConfig:
        """A configuration with these fields. Raises CELoraError for an unknown field, with the nearest known name."""
        if not isinstance(values, Mapping):
            raise CELoraError(f"celora configuration is {values!r}; expected a mapping of settings.")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise unknown("celora setting", key, known)
        return cls(**values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON to `path`, or to `celora_config.json` in it if it is a folder."""
        write_text(inside(path, CONFIG_NAME), json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CELoraConfig:
        """Read what `save` wrote."""
        return cls.from_dict(read_json(inside(path, CONFIG_NAME)))


def balanced_rank(lora_rank: int) -> int:
    """The published split of one memory budget: trainable and frozen rank both `floor(7/8 lora_rank)`, at least 1."""
    return max(1, 7 * lora_rank // 8)


def matches(pattern: str, name: str) -> bool:
    """Whether the glob `pattern` matches the dotted `name` or a dotted end of it; `=name` is that layer alone."""
    if pattern.startswith("="):
        return name == pattern[1:]
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


LAYER_FIELDS = tuple(field.name for field in dataclasses.fields(LayerConfig))
_SETTINGS = frozenset(LAYER_FIELDS) - {"estimator", "saved_input"}  # of an estimator


def _check_layer(config: LayerConfig) -> None:
    if not isinstance(config.estimator, str):
        raise CELoraError(f"estimator={config.estimator!r}; expected the name of an estimator.")
    if config.rank not in ("balanced", "adapter"):
        _check_int("rank", config.rank, 0, 'Use 0 for no frozen factor, "balanced" or "adapter".')
    if not isinstance(config.weight_copy, bool):
        raise CELoraError(f"weight_copy={config.weight_copy!r}; expected true or false.")
    if config.saved_input not in get_args(SavedInput):
        raise unknown("saved_input", str(config.saved_input), get_args(SavedInput))
    estimator_class(config.estimator)
    Settings(**{name: getattr(config, name) for name in _SETTINGS if name != "rank"})
    if isinstance(config, CELoraConfig):
        changed = [f.name for f in dataclasses.fields(LayerConfig) if getattr(config, f.name) != f.default]
        _check_uses(config, changed)


def _check_uses(config: LayerConfig, names: Iterable[str]) -> None:
    """Refuse settings that the chosen estimator would ignore, except keep_ratio and rank, which have other defaults."""
    uses = estimator_class(config.estimator).uses
    for name in names:
        if name in _SETTINGS - {"keep_ratio", "rank"} - uses:
            advice = f"; use estimator={config.precision!r}" if name == "precision" else ""
            raise CELoraError(
                f"{name}={getattr(config, name)!r} means nothing to the estimator {config.estimator!r}{advice}."
            )


def _check_int(name: str, value: object, least: int, advice: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CELoraError(f"{name}={value!r}; expected an integer >= {least}. {advice}".rstrip())
