"""One forward of a language model whose loss celora computes."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import ModelOutput

from celora.errors import CELoraError, out_of_memory
from celora.machine.device import random_states
from celora.machine.processes import gathers
from celora.modeling import packing
from celora.modeling.attention import names_ours, use_ours, use_sdpa
from celora.modeling.language_model import decoder_of, of_transformers
from celora.modeling.onlookers import may_look_at_shapes
from celora.modeling.recognise import IGNORED, Probe, settings
from celora.numerics.head import TokenScores

TRL = "fused_lm_head"  # TRL's trainers ask for log-probabilities instead of logits
# Arguments that only the model's own head can serve.
REFUSED = ("cache", "past_key_values", "use_cache", "logits_to_keep", "shift_labels")
OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")  # also in the configuration
# Arguments of a batch that is packed already, or that has no tokens.
_UNPACKED = ("inputs_embeds", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_BATCH = ("input_ids", "attention_mask", "position_ids", "labels", "num_items_in_batch")
_KNOWN = frozenset({*_BATCH, *REFUSED, *OUTPUTS, *_UNPACKED, TRL, "return_dict", "ignore_index"})


@dataclass
class ScoredOutput(ModelOutput):  # type: ignore[misc]
    """The output of a call with `fused_lm_head=True`, as TRL expects it.

    The fields of each token are (B, T-1), and 0 where a token has no label.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


class NoCache(CELoraError, AttributeError):
    """Somebody uses a cache that was left out. For `hasattr`, it has no attributes."""


class LeftOut:
    """Stands for the cache of keys and values that a call with labels has left out."""

    def __getattr__(self, name: str) -> Any:
        raise NoCache(
            "while a model trains on labels, celora leaves the cache of keys and values out of its output; call the "
            "model with use_cache=True to get it"
        )

    def __iter__(self) -> Iterator[Any]:
        return iter(self.layers)

    def __getitem__(self, layer: int) -> Any:
        return self.layers[layer]

    def __len__(self) -> int:
        return len(self.layers)

    def __bool__(self) -> bool:
        return True


@dataclass
class Call:
    """One forward whose loss celora computes."""

    owner: Any  # the model that was called
    given: dict[str, Any]  # the caller's arguments
    next_labels: Tensor  # (B, T): the label of each token's successor
    place: Tensor  # (N,): positions in the flattened batch of tokens whose successor is labelled
    rows: Tensor  # (N,): positions of the same tokens in the hidden states
    shape: torch.Size  # shape of the tokens that the model gets
    known: Known  # everything that decides how the model turns hidden states into a loss
    probe: Probe | None  # given if this is not known yet
    keeps: slice | Tensor  # `logits_to_keep`, as the model gets it: an object of this call alone
    hidden: Tensor | None = None  # the decoder's output

    def is_made_with(self, arguments: Mapping[str, Any]) -> bool:
        """Whether these are arguments of this call."""
        return arguments.get("logits_to_keep") is self.keeps

    def goes_on(self) -> bool:
        """Whether the caller is inside this call. If not, it was interrupted, and no hook was called."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if self.is_made_with(frame.f_locals) or self.is_made_with(frame.f_locals.get("kwargs") or {}):
                return True
            frame = frame.f_back
        return False

    def with_loss(self, output: Any, loss: Tensor) -> Any:
        """The model's output with this loss, and without what it does not compute: logits, and usually a cache."""
        found = type(output)(**{**output, "loss": loss, "logits": None})
        config, decoder = self.owner.config.get_text_config(), decoder_of(self.owner)
        asked = self.given.get("use_cache") is None and getattr(config, "use_cache", False)
        if asked and not getattr(decoder, "gradient_checkpointing", False):
            for name in {field.name for field in dataclasses.fields(output)} & {"cache", "past_key_values"}:
                if getattr(output, name) is None:
                    found.__dict__[name] = LeftOut()  # the attribute alone: libraries walk the items of an output
        return found

    def for_trl(self, loss: Tensor, scores: TokenScores, means: Tensor | None) -> ScoredOutput:
        """The output that TRL asks for with `fused_lm_head=True`. `means`: of the tokens' logits, (N,), or None."""
        assert scores.entropy is not None
        assert scores.top1 is not None
        log_probs, entropy, is_top1 = map(self._spread, (scores.log_probs, scores.entropy, scores.top1))
        mask = self.next_labels[:, :-1] != IGNORED
        mean_logits = None if means is None else self._spread(means)
        return ScoredOutput(loss, log_probs, entropy, mean_logits, is_top1, mask)

    def _spread(self, values: Tensor) -> Tensor:
        """Put values of the labelled tokens, (N,), at their positions in the batch: (B, T-1), where its labels are."""
        values = values.to(self.next_labels.device)
        full = values.new_zeros(self.next_labels.numel()).index_copy(0, self.place, values)
        return full.view(self.next_labels.shape)[:, :-1]


class OpenCalls:
    """The call of a model that is going on, and the calls that it is inside of.

    A hook may call the model again, for example for a reference. The model computes such a call by itself.

    Attributes:
        current: the innermost call; None where the model computes it, or if there is none.
        around: the calls around it, the outermost first, and whether the configuration named celora's attention then.
    """

    def __init__(self) -> None:
        self.current: Call | None = None
        self.around: list[tuple[Call | None, bool]] = []

    @property
    def outermost(self) -> Call | None:
        return self.around[0][0] if self.around else self.current

    def end(self) -> Call | None:
        """End the current call, and return it."""
        call, self.current = self.current, None
        if call is not None:
            use_sdpa(call.owner.config)
            if call.probe is not None:
                call.probe.leave()
        return call

    def forget(self) -> None:
        """End all calls: they were interrupted."""
        self.around.clear()
        self.end()

    def step_aside(self) -> None:
        """Begin a call inside the current one."""
        named = self.current is not None and names_ours(self.current.owner.config)
        self.around.append((self.end(), named))

    def step_back(self, at_head: Callable[..., Any], arguments: Mapping[str, Any]) -> bool:
        """End a call inside another one, which goes on. Returns whether these are the outer call's arguments.

        Args:
            at_head: the hook of the head, for a call that probes it.
        """
        self.current, named = self.around.pop()
        call = self.current
        if call is None:
            return False
        if call.probe is not None:
            call.probe.enter(call.owner, at_head)
        if named:
            use_ours(call.owner.config)
        return call.is_made_with(arguments)


def unknown_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call that celora does not know. A value of False counts, too: `is_causal=False` matters."""
    return {name: value for name, value in given.items() if name not in _KNOWN and value is not None}


def stays_padded(causal: Any, given: Mapping[str, Any], shape: torch.Size) -> str | None:
    """Why the batch of a call keeps its padding; '' if its arguments show it; None if it may be packed."""
    ids, mask, positions = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if any(given.get(name) is not None for name in _UNPACKED):
        return ""
    fit_together = all(isinstance(t, Tensor) and t.shape == shape for t in (ids, mask, positions) if t is not None)
    if ids is None or not fit_together or (mask is None and positions is not None):
        return ""
    if unknown := unknown_arguments(given):
        return f"what {next(iter(unknown))!r} among the arguments does is not known"
    return packing.cannot_pack(causal, may_look_at_shapes) or None


def unknown_tensor(causal: Any, given: Mapping[str, Any]) -> str:
    """The name of an argument by which a forward that is not Transformers' may compute its loss; '' if there is none.

    A plain value is a part of what is known of the model. Tensors and lists may change in each call.
    """
    several = (name for name, value in unknown_arguments(given).items() if not isinstance(value, str | int | float))
    return "" if of_transformers(causal) else next(several, "")


def takes(causal: Any, given: Mapping[str, Any]) -> bool:
    """Whether a model can compute the loss of a probe's few labels. One that is not Transformers' is tried.

    Processes that gather its weights cannot try it, because some may fail.
    """
    if of_transformers(causal):
        return True
    if gathers(causal):
        return False
    with torch.no_grad(), random_states({parameter.device for parameter in causal.parameters()}):
        try:
            causal.forward(**given)
        except Exception as error:  # whatever such a forward raises
            if out_of_memory(error):
                raise
            return False
        finally:
            torch.clear_autocast_cache()  # older torch would use casts that were made without gradients again
    return True


@dataclass(frozen=True)
class Known:
    """What `known_by` knows.

    Attributes:
        numbers: (name, number) among the attributes of a model that is not one of Transformers. Its forward may add a
            term to the loss, with a weight that is 0 at first. If one changes, nothing is known of it.
    """

    parts: tuple[Any, ...]
    numbers: frozenset[tuple[str, float]]

    def changed_number(self, before: Known) -> str:
        """The name of a number that was another one before; '' if all are the same.

        Without numbers, the class's forward was Transformers' own; if only one of the two has some, it was replaced.
        """
        if bool(self.numbers) != bool(before.numbers):
            return "forward"
        return min((name for name, _ in self.numbers ^ before.numbers), default="")


def known_by(causal: Any, given: Mapping[str, Any]) -> Known:
    """Everything that decides how a model turns hidden states into a loss. If it changes, the model is probed again."""
    head = causal.get_output_embeddings()
    hooks = decoder_of(causal)._forward_hooks.values()  # one of them may change what the head gets
    own = vars(causal).get("forward")
    parts = (head, head.forward, causal.loss_function, F.cross_entropy, type(causal).forward, own, *hooks)
    references = tuple(None if part is None else _reference(getattr(part, "__func__", part)) for part in parts)
    arguments = {
        name: value if isinstance(value, str | int | float) else None
        for name, value in unknown_arguments(given).items()
    }
    arguments["num_items_in_batch"] = given.get("num_items_in_batch") is not None
    told = tuple(settings(causal.config).items()), tuple(sorted(arguments.items()))
    plain = ((name, value) for name, value in vars(causal).items() if isinstance(value, int | float))
    numbers = frozenset((name, value) for name, value in plain if name != "training")
    if of_transformers(causal):  # a probe shows what they change
        return Known((*references, head.weight.dtype, *told, numbers), frozenset())
    return Known((*references, head.weight.dtype, *told), numbers)


def _reference(part: Any) -> Any:
    """A weak reference; the object itself where it has none, as an object with slots."""
    try:
        return weakref.ref(part)
    except TypeError:
        return part


def fit(labels: Tensor, given: Mapping[str, Any]) -> bool:
    """Whether labels and mask fit the tokens. If not, the model's own loss or error is best."""
    if labels.dtype != torch.int64 or labels.dim() != 2:
        return False
    tokens: Any = next((of for name in ("input_ids", "inputs_embeds") if (of := given.get(name)) is not None), None)
    mask = given.get("attention_mask")  # with a cache, Transformers pads or crops one of another length
    masked = not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] == labels.shape[1]
    return isinstance(tokens, Tensor) and tokens.shape[:2] == labels.shape and masked


def wants_own_head(given: Mapping[str, Any], config: Any) -> bool:
    """Whether a call asks for something that only the model's own head can serve."""
    if given.get("ignore_index", IGNORED) != IGNORED:
        return True
    if given.get("return_dict", getattr(config, "return_dict", True)) is False:
        return True
    configs = (config, config.get_text_config())
    asked = [given.get(name) for name in REFUSED]
    asked += [given.get(name, getattr(each, name, None)) for name in OUTPUTS for each in configs]
    return any(map(is_set, asked))


def is_set(value: Any) -> bool:
    """Whether an argument asks for something: it is neither None nor False nor 0."""
    return isinstance(value, Tensor) or value not in (None, False, 0)
