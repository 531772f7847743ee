"""A plan: the estimator of each layer, with the measurements behind it. Saved as JSON, printed as a table."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import device as Device
from torch import nn

from celora.errors import CELoraError, unknown
from celora.files import inside, read_json, write_text
from celora.machine.device import measured_on
from celora.modeling.report import SAVED, aligned, counts
from celora.modeling.survey import Survey, survey
from celora.numerics.estimators import estimator_class
from celora.settings.config import CELoraConfig, LayerConfig
from celora.settings.names import HEAD, PLAN_NAME
from celora.settings.presets import PRESETS
from celora.weights.read import shape_of

_VERSION = 1
_LARGEST = sys.float_info.max
_LAYERS = ("layers", "head")  # the fields that are not plain values


@dataclass(frozen=True)
class Candidate:
    """One way to estimate one layer, with the measured time of its `grad_input` and its relative error.

    Attributes:
        time_ms: in a plan with forwards, also that of the layer's forward, as often as it runs for one backward.
        memory: bytes of its 8-bit copy.
        forward_error: the squared relative error that its forward in 8 bits brings into the LoRA gradient.
    """

    setting: LayerConfig
    time_ms: float
    relative_error: float
    memory: int = 0
    forward_error: float = 0.0


@dataclass(frozen=True)
class PlannedLayer:
    """A layer with all its candidates and the chosen one.

    Attributes:
        influence: the share of this layer's squared relative error that arrives in the whole model's LoRA gradient.
        candidates: all measured candidates, dense first; `candidates[chosen]` is the chosen one.
    """

    name: str
    out_features: int
    in_features: int
    influence: float
    candidates: tuple[Candidate, ...]
    chosen: int

    @property
    def choice(self) -> Candidate:
        """The chosen candidate."""
        return self.candidates[self.chosen]

    @property
    def dense_ms(self) -> float:
        """Time of the exact product; in a plan with forwards, of both directions."""
        return self.candidates[0].time_ms


@dataclass(frozen=True)
class Plan:
    """One estimator for each layer, with the measurements behind it.

    Attributes:
        layers: the measured layers; any other layer stays dense.
        head: the vocabulary projection; None if celora does not compute it. Its gradient goes through a share of the
            words (`head_keep_ratio`). Its error is the error that arrives in the LoRA gradient.
        fidelity: the least cosine of the LoRA gradient that was asked for.
        predicted_cosine: the cosine expected from the layers' errors and influences.
        audited_cosine: the measured cosine of the whole plan, on the sum of `audited_batches` batches. Planning used
            them for nothing else if it had three batches or more.
        predicted_time: the time of all `grad_input` products of `layers`, relative to dense, from their own times. If
            forwards were considered, their times are in it, too.
        audited_time: the same, measured inside whole backwards.
        tokens: number of tokens in the batches of the plan.
        dtype, device, threads, torch: the conditions of the measurements.
        memory_limit: bytes that 8-bit copies of all layers together may take.
        loss_shift: by how much the plan's forwards in 8 bits changed the loss of the audited batches.
    """

    layers: tuple[PlannedLayer, ...]
    fidelity: float
    predicted_cosine: float
    audited_cosine: float
    predicted_time: float
    audited_time: float
    tokens: int
    dtype: str
    device: str
    threads: int
    torch: str
    memory_limit: int
    head: PlannedLayer | None = None
    audited_batches: int = 1
    loss_shift: float = 0.0

    @property
    def _all(self) -> tuple[PlannedLayer, ...]:
        return self.layers if self.head is None else (*self.layers, self.head)

    @property
    def memory(self) -> int:
        """Bytes of all 8-bit copies."""
        return sum(layer.choice.memory for layer in self.layers)

    @property
    def forwards(self) -> int:
        """How many layers compute their forward in 8 bits."""
        return sum(layer.choice.setting.forward != "exact" for layer in self.layers)

    def config(self, frame: CELoraConfig | None = None, given: Collection[str] = ()) -> CELoraConfig:
        """The configuration that carries out the plan, based on `frame`, by default preset auto. Its overrides win.

        The other settings of layers in `frame` are for layers that are not in the plan. A `head_keep_ratio` in `given`
        is the user's, and stays.
        """
        frame = frame or PRESETS["auto"]
        planned = {f"={layer.name}": _whole(layer.choice.setting) for layer in self.layers}
        keep_ratio = frame.head_keep_ratio
        if (
            self.head is not None
            and self.head.choice.setting.estimator != "dense"
            and frame.labelled_head
            and keep_ratio == 1
            and "head_keep_ratio" not in given
        ):
            keep_ratio = self.head.choice.setting.keep_ratio
        return dataclasses.replace(frame, overrides={**planned, **frame.overrides}, head_keep_ratio=keep_ratio)

    def check(self, model: nn.Module | Survey) -> None:
        """Refuse a plan for another model or device, where its times and errors mean nothing.

        Args:
            model: the model, or its `survey`.

        Raises:
            CELoraError: a planned layer is missing or has another shape, this is not the device it was measured on, or
                torch has another number of threads.
        """
        found = model if isinstance(model, Survey) else survey(model)
        self.check_layers(found)
        if reason := self.elsewhere(found.device):
            raise CELoraError(f"{reason}; make a new plan.")

    def check_layers(self, found: Survey) -> None:
        """Refuse a plan that cannot be carried out: a planned layer is missing or has another shape."""
        shapes = {name: layer.shape for name, layer in found.layers.items()}
        if found.language_model is not None:
            shapes[HEAD] = shape_of(found.language_model.head)
        for layer in self.layers if found.language_model is None else self._all:  # the head stays exact then
            shape = shapes.get(layer.name)
            if shape is None:
                raise CELoraError(
                    f"the plan is for another model: there is no adapted layer {layer.name!r} here; make a new plan."
                )
            if shape != (layer.out_features, layer.in_features):
                raise CELoraError(
                    f"the plan is for another model: {layer.name!r} is {shape[0]} x {shape[1]} here, "
                    f"{layer.out_features} x {layer.in_features} in the plan; make a new plan."
                )

    def elsewhere(self, device: Device) -> str:
        """Why the plan's times are not valid on this machine; '' if they are."""
        if (here := measured_on(device)) != self.device:
            return f"the plan was measured on {self.device!r} and this is {here!r}"
        if device.type == "cpu" and torch.get_num_threads() != self.threads:
            return f"the plan was measured with {self.threads} threads and torch has {torch.get_num_threads()} here"
        return ""

    def other_batches(self, tokens: int, dtype: str) -> str:
        """Why the plan's times and errors are not valid for backwards of so many tokens in this dtype; '' if they are.

        Up to a factor of 2 in the number of tokens is fine, because ragged batches differ by that.
        """
        if dtype == self.dtype and self.tokens / 2 <= tokens <= self.tokens * 2:
            return ""
        return (
            f"the plan was measured with backwards of {self.tokens} tokens of {self.dtype}, and training has up to "
            f"{tokens} of {dtype}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values; `from_dict` is the inverse. Each setting of candidates is written once."""
        settings = list(dict.fromkeys(c.setting for layer in self._all for c in layer.candidates))
        number = {setting: i for i, setting in enumerate(settings)}

        def row(c: Candidate) -> list[Any]:
            of_forward = [] if c.setting.forward == "exact" else [c.forward_error]
            return [number[c.setting], c.time_ms, c.relative_error, c.memory, *of_forward]

        def values(layer: PlannedLayer) -> dict[str, Any]:
            return {
                "name": layer.name,
                "out_features": layer.out_features,
                "in_features": layer.in_features,
                "influence": layer.influence,
                "chosen": layer.chosen,
                "candidates": [row(candidate) for candidate in layer.candidates],
            }

        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _LAYERS}
        document = {"version": _VERSION, **own, "settings": [_changes(s) for s in settings]}
        head = None if self.head is None else values(self.head)
        return document | {"layers": [values(layer) for layer in self.layers], "head": head}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The plan with these values. Raises CELoraError if they are not a plan."""
        if not isinstance(values, Mapping):
            raise CELoraError(f"a plan is a mapping, not {type(values).__name__}.")
        if values.get("version") != _VERSION:
            raise CELoraError(f"plan of version {values.get('version')!r}; this celora reads version {_VERSION}.")
        known = {f.name: f.type for f in dataclasses.fields(cls)}
        for key in values:
            if key not in {*known, "version", "settings"}:
                raise unknown("entry of a plan", key, known)
        try:
            settings = [LayerConfig(**setting) for setting in values["settings"]]
            layers = tuple(_planned(layer, settings) for layer in values["layers"])
            head = None if values.get("head") is None else _planned(values["head"], settings)
            kinds = {"float": float, "int": int, "str": str}
            own = {name: kinds[str(kind)](values[name]) for name, kind in known.items() if name not in _LAYERS}
            for name, kind in known.items():
                if kind in ("float", "int"):
                    most = 1.0 if name in ("fidelity", "predicted_cosine", "audited_cosine") else _LARGEST
                    least = {"loss_shift": -_LARGEST}.get(name, -1.0 if name.endswith("_cosine") else 0.0)
                    _measured(own[name], name, least=least, most=most)
        except CELoraError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise CELoraError(f"not a whole plan: {type(error).__name__}: {error}") from None
        return cls(layers=layers, head=head, **own)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON to `path`, or to `celora_plan.json` in it if it is a folder."""
        write_text(inside(path, PLAN_NAME), json.dumps(self.to_dict()) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote."""
        file = inside(path, PLAN_NAME)
        document = read_json(file)
        try:
            return cls.from_dict(document)
        except CELoraError as error:
            raise CELoraError(f"{file}: {error}") from None

    def __str__(self) -> str:
        if not self.layers:
            return "No layer of this model can be estimated, or none sees a gradient: everything stays exact."
        groups: dict[tuple[Any, ...], list[PlannedLayer]] = {}
        for layer in self._all:
            key = (layer.name.rpartition(".")[2], layer.out_features, layer.in_features, label(layer.choice.setting))
            groups.setdefault(key, []).append(layer)
        rows = [("layers", "", "shape", "estimator", "time / dense", "error (worst)")]
        for ((kind, out, inp, name), alike), count in zip(groups.items(), counts(groups), strict=True):
            time = sum(layer.choice.time_ms for layer in alike) / max(1e-9, sum(layer.dense_ms for layer in alike))
            error = max(layer.choice.relative_error for layer in alike)
            rows.append((kind, count, f"{out} x {inp}", name, f"{time:.2f}", f"{error:.3f}"))
        summed = f" (sum of {self.audited_batches} batches)" if self.audited_batches > 1 else ""
        considered = any(c.setting.forward != "exact" for layer in self.layers for c in layer.candidates)
        products = "Forward and grad_input" if considered else "grad_input"
        said = [f"{self.forwards} forwards in 8 bits change the loss by {self.loss_shift:+.4f}."] * bool(self.forwards)
        return "\n".join(
            [
                *aligned(rows),
                f"LoRA gradient: cosine {self.audited_cosine:.4f} audited{summed}, "
                f"{self.predicted_cosine:.4f} predicted, {self.fidelity:g} asked for.",
                f"{products} of adapted layers: {self.audited_time:.2f} of the exact time measured, "
                f"{self.predicted_time:.2f} predicted; 8-bit copies take {self.memory / 2**20:.0f} MiB.",
                *said,
                f"Made for {self.tokens} tokens, {self.dtype}, {self.threads} threads on {self.device}.",
            ]
        )


def label(setting: LayerConfig) -> str:
    """A setting in words: `tokens energy 0.99 x int8`."""
    words = [setting.estimator]
    if "keep_ratio" in estimator_class(setting.estimator).uses:
        words += [] if setting.selection == "topk" else [setting.selection]
        words.append(f"{setting.keep_ratio:g}")
        words += [] if setting.precision == "native" else ["x", setting.precision]
    if not setting.weight_copy:
        words.append("(no copy)")
    both = ", forward too" if setting.forward != "exact" else ""
    return " ".join(words) + both + SAVED.get((setting.forward, setting.saved_input), "")


def _changes(setting: LayerConfig) -> dict[str, Any]:
    """The estimator, and the fields that differ from the defaults of LayerConfig."""
    defaults = LayerConfig()
    values = dataclasses.asdict(setting)
    return {name: v for name, v in values.items() if name == "estimator" or v != getattr(defaults, name)}


def _whole(setting: LayerConfig) -> dict[str, Any]:
    """The estimator, and all fields that it uses. How inputs are saved is the frame's choice, unless the plan says."""
    used = {"estimator", *estimator_class(setting.estimator).uses}
    used |= {"saved_input"} if setting.saved_input != "forward" else set()
    return {name: value for name, value in dataclasses.asdict(setting).items() if name in used}


def _planned(layer: Mapping[str, Any], settings: list[LayerConfig]) -> PlannedLayer:
    return PlannedLayer(
        name=str(layer["name"]),
        out_features=int(_measured(layer["out_features"], "out_features")),
        in_features=int(_measured(layer["in_features"], "in_features")),
        influence=_measured(layer["influence"], "influence"),
        candidates=tuple(
            Candidate(
                settings[_position(i, settings)],
                time_ms=_measured(time, "time_ms"),
                relative_error=_measured(error, "relative_error", most=math.inf),
                memory=int(_measured(memory, "memory")),
                forward_error=_measured(forward, "forward_error", most=math.inf),
            )
            for i, time, error, memory, forward in (
                row if len(row) == 5 else [*row, 0.0] for row in layer["candidates"]
            )
        ),
        chosen=_position(layer["chosen"], layer["candidates"]),
    )


def _measured(value: Any, name: str, least: float = 0.0, most: float = _LARGEST) -> float:
    """A number, refused if no measurement can have given it."""
    number = float(value)
    if not least <= number <= most:
        raise ValueError(f"{name}={number:g}, which nobody can have measured")
    return number


def _position(value: object, items: list[Any]) -> int:
    if not isinstance(value, int) or not 0 <= value < len(items):
        raise IndexError(f"position {value!r} of {len(items)}")
    return value
