"""All packed sequences in one call: what the functions of a GPU are given, computed by torch on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

import celora
from celora.modeling import attention, varlen
from decoders import model_of
from labelled import gradients, ragged
from patching import patch_all
from tolerances import OF_GRADIENT
from without import pretend

LENGTHS = (5, 1, 20, 17)
BEGINS = torch.tensor([0, 5, 6, 26, 43], dtype=torch.int32)


def one_by_one(query: Tensor, key: Tensor, value: Tensor, begins: Tensor, longest: int, scale: float) -> Tensor:
    """What `varlen.half_function` gives: (N, heads, d)."""
    assert longest == int(begins.diff().max())
    rows = [
        scaled_dot_product_attention(
            *(t[first:last].transpose(0, 1) for t in (query, key, value)), is_causal=True, scale=scale, enable_gqa=True
        )
        for first, last in pairwise(begins.tolist())
    ]
    return torch.cat(rows, dim=1).transpose(0, 1)


def by_mask(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, scaling: float
) -> tuple[Tensor, None]:
    """What Transformers' FlexAttention gives for a mask: (1, N, heads, d)."""
    assert query.dtype == key.dtype == value.dtype  # it refuses others
    found = scaled_dot_product_attention(query, key, value, seen_by(mask), scale=scaling, enable_gqa=True)
    return found.transpose(1, 2), None


def seen_by(mask: Any) -> Tensor:
    places = torch.arange(mask.shape[-1])
    return mask.mask_mod(torch.tensor(0), torch.tensor(0), places[:, None], places[None])


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Take the paths of a GPU, with functions of the CPU."""
    monkeypatch.setattr(varlen, "available", lambda device: True)
    monkeypatch.setattr(varlen, "half_function", lambda: one_by_one)
    monkeypatch.setitem(AttentionInterface._global_mapping, "flex_attention", by_mask)
    pretend(monkeypatch, "attention", there=False)
    varlen._works.cache_clear()
    yield monkeypatch
    varlen._works.cache_clear()


@pytest.fixture
def versions() -> Iterator[None]:
    varlen._torch_function.cache_clear()
    yield
    varlen._torch_function.cache_clear()


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize("grouped", [True, False])
def test_a_version_without_grouped_heads_is_given_equal_ones(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def newer(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, _: Tensor, longest: int, __: int, *, scale: float,
              window_size: tuple[int, int], enable_gqa: bool = False) -> Tensor:  # fmt: skip
        assert enable_gqa == (q.shape[1] != k.shape[1])
        assert window_size == (-1, 0)
        return one_by_one(q, k, v, begins, longest, scale)

    def older(q: Tensor, k: Tensor, v: Tensor, begins: Tensor, _: Tensor, longest: int, __: int, *, scale: float,
              window_size: tuple[int, int]) -> Tensor:  # fmt: skip
        assert q.shape == k.shape == v.shape
        return one_by_one(q, k, v, begins, longest, scale)

    there = SimpleNamespace(varlen_attn=newer if grouped else older)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", there)
    function = varlen.half_function()
    assert function is not None
    for kv_heads in (4, 2):
        given = [torch.randn(sum(LENGTHS), heads, 16) for heads in (4, kv_heads, kv_heads)]
        expected = one_by_one(*given, BEGINS, max(LENGTHS), 0.25)
        torch.testing.assert_close(function(*given, BEGINS, max(LENGTHS), 0.25), expected)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_one_call_equals_a_call_each(kv_heads: int) -> None:
    n = sum(LENGTHS)
    tensors = [torch.randn(1, heads, n, 16).bfloat16().requires_grad_() for heads in (4, kv_heads, kv_heads)]
    module, grad = SimpleNamespace(num_key_value_groups=4 // kv_heads), torch.randn(1, n, 4, 16).bfloat16()
    where: list[dict[str, Any]] = [{}, {"cu_seq_lens_q": BEGINS, "max_length_q": max(LENGTHS)}]
    found = []
    for given in where:
        out, _ = attention.attention(module, *tensors, None, celora_lengths=LENGTHS, **given)
        found.append([out.detach(), *torch.autograd.grad(out, tensors, grad)])
    for one, each in zip(*found, strict=True):
        assert (one - each).float().norm() < 1e-2 * each.float().norm()


@pytest.mark.parametrize(
    ("dtype", "largest_head"), [(torch.float32, 256), (torch.bfloat16, 256), (torch.bfloat16, 8)], ids=str
)
def test_a_packed_batch_trains_like_a_padded_one(
    dtype: torch.dtype, largest_head: int, on_gpu: pytest.MonkeyPatch
) -> None:
    """Heads of 16 are too large for a function that takes 8, and FlexAttention takes them."""
    model, batch = model_of("llama"), ragged([12, 3, 7])
    on_gpu.setattr(varlen, "_LARGEST_HEAD", largest_head)
    masked = dtype == torch.float32 or varlen.head_size(model.config) > largest_head
    assert varlen.compiles(model.config, torch.device("cpu"), dtype) is not masked
    assert varlen.computes(model.config, torch.device("cpu"), dtype)  # which is tried once
    calls = []
    usual = varlen.attend
    on_gpu.setattr(varlen, "attend", lambda *given: calls.append(given) or usual(*given))
    patch_all(on_gpu, "celora.modeling.attention:_say_one_by_one", None)  # must not be called
    loss, exact = gradients(model, batch)
    _, padded = gradients(model.to(dtype), batch)
    celora.attach(model, "exact")
    for _ in range(2):  # the first call is also compared with the model's own
        found, packed = gradients(model, batch)
    assert len(calls) == 2 * model.config.num_hidden_layers
    assert all(hasattr(mask, "mask_mod") == masked for *_, mask, _ in calls)
    rounding = 2 * (padded - exact).norm()  # 0 in float32
    assert found == pytest.approx(loss, rel=1e-6 if dtype == torch.float32 else 1e-2)
    assert (packed - exact).norm() < rounding + OF_GRADIENT * exact.norm()


def test_a_token_sees_earlier_tokens_of_its_sequence() -> None:
    mask = varlen.block_mask(BEGINS, sum(LENGTHS), torch.float32, 16)
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(len(sequence))
    assert mask.shape == (1, 1, 43, 43)
    assert seen_by(mask).equal((sequence[:, None] == sequence) & (place[:, None] >= place))


@pytest.mark.parametrize("lengths", [[1], [128], [127, 1, 128, 3], [300, 20, 129, 255], [1] * 130, [600, 256, 1]])
def test_blocks_are_those_that_torch_finds_in_all_pairs(lengths: list[int]) -> None:
    tokens, begins = sum(lengths), torch.tensor([0, *lengths]).cumsum(0).int()
    found = varlen.block_mask(begins, tokens, torch.float32, 16)
    expected = create_block_mask(found.mask_mod, None, None, tokens, tokens, device="cpu").as_tuple()
    for one, other in zip(found.as_tuple(), expected, strict=True):
        assert one.equal(other) if isinstance(other, Tensor) else one == other


def lacks_the_kernel(*_: Any) -> Tensor:
    raise RuntimeError("no kernel image is available for execution on the device")


def lacks_the_backward(query: Tensor, *others: Any) -> Tensor:
    return one_by_one(query, *others).detach() * 1


def is_not_finite(query: Tensor, *others: Any) -> Tensor:
    return one_by_one(query, *others) * float("nan")


def sees_other_sequences(query: Tensor, key: Tensor, value: Tensor, begins: Tensor, *_: Any) -> Tensor:
    whole = torch.tensor([0, len(query)])
    return one_by_one(query, key, value, whole, len(query), query.shape[2] ** -0.5)


def takes_other_heads(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
    return one_by_one(query, key.flip(1), value.flip(1), *others)


def has_another_scale(query: Tensor, key: Tensor, value: Tensor, begins: Tensor, longest: int, scale: float) -> Tensor:
    return one_by_one(query, key, value, begins, longest, 1.1 * scale)


def loses_a_gradient(query: Tensor, key: Tensor, *others: Any) -> Tensor:
    return one_by_one(query, key.detach() + 0 * key, *others)


WRONG = [sees_other_sequences, takes_other_heads, has_another_scale, loses_a_gradient]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [8, 64, 256])
def test_the_trial_finds_what_is_wrong_and_finite(size: int, dtype: torch.dtype, on_gpu: pytest.MonkeyPatch) -> None:
    for function in (one_by_one, *WRONG):
        on_gpu.setattr(varlen, "half_function", lambda function=function: function)
        varlen._works.cache_clear()
        assert varlen._works(torch.device("cpu"), dtype, size) is (function is one_by_one)


@pytest.mark.parametrize("size", [8, 20, 264])
def test_the_trial_finds_a_wrong_mask(size: int, on_gpu: pytest.MonkeyPatch) -> None:
    """FlexAttention computes float32 and, in half precision, the heads that the function refuses."""
    kinds = [dtype for dtype in (torch.float32, HALF) if dtype == torch.float32 or size != 8]
    assert all(varlen._works(torch.device("cpu"), dtype, size) for dtype in kinds)
    varlen._works.cache_clear()

    def unmasked(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, *, scaling: float) -> tuple[Tensor, None]:
        return scaled_dot_product_attention(q, k, v, scale=scaling, enable_gqa=True).transpose(1, 2), None

    on_gpu.setitem(AttentionInterface._global_mapping, "flex_attention", unmasked)
    assert not any(varlen._works(torch.device("cpu"), dtype, size) for dtype in kinds)


@pytest.mark.parametrize(
    ("capability", "computed"),
    [
        ((7, 0), {}),
        ((7, 5), {torch.float32: "masked", torch.float16: "masked"}),
        ((8, 0), {torch.float32: "masked", torch.float16: "", torch.bfloat16: ""}),
        ((12, 0), {torch.float32: "masked", torch.float16: "", torch.bfloat16: ""}),
    ],
)
def test_what_computes_in_one_call(
    capability: tuple[int, int], computed: dict[torch.dtype, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(varlen, "half_function", lambda: one_by_one)
    monkeypatch.setattr(varlen, "_works", lambda *_: True)
    config, device = model_of("llama").config, torch.device("cuda")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert varlen.computes(config, device, dtype) is (dtype in computed)
        if dtype in computed:
            assert varlen.compiles(config, device, dtype) is (computed[dtype] != "masked")
        assert not varlen.computes(config, torch.device("cpu"), dtype)


@pytest.mark.parametrize("function", [lacks_the_kernel, lacks_the_backward, is_not_finite, sees_other_sequences])
def test_where_the_function_fails_sequences_are_computed_one_by_one(
    function: Callable[..., Tensor], on_gpu: pytest.MonkeyPatch
) -> None:
    """Builds of torch for other GPUs have the name and not the kernels."""
    on_gpu.setattr(varlen, "half_function", lambda: function)
    said: list[str] = []
    patch_all(on_gpu, "celora.modeling.attention:_say_one_by_one", lambda kind, _: said.append(kind))
    model, batch = model_of("llama"), ragged([12, 3, 7])
    loss, _ = gradients(model.bfloat16(), batch)
    celora.attach(model, "exact")
    found, _ = gradients(model, batch)
    assert found == pytest.approx(loss, rel=1e-2)
    assert said == ["cpu"] * model.config.num_hidden_layers
    assert not varlen.compiles(model.config, torch.device("cpu"), torch.bfloat16)
    assert varlen.computes(model.config, torch.device("cpu"), torch.float32)  # by FlexAttention


def test_a_trial_that_had_no_memory_is_repeated(on_gpu: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    config = model_of("llama").config
    on_gpu.setattr(varlen, "half_function", lambda: full)
    with pytest.raises(torch.OutOfMemoryError):
        varlen.computes(config, torch.device("cpu"), torch.bfloat16)
    on_gpu.setattr(varlen, "half_function", lambda: one_by_one)
    assert varlen.computes(config, torch.device("cpu"), torch.bfloat16)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("masked", [False, True])
def test_under_autocast_one_call_takes_a_query_in_float32_and_a_value_in_bfloat16(masked: bool) -> None:
    """A model in float32 gives both: the embedding of positions is in float32."""
    query, key = (torch.randn(1, heads, 43, 16) for heads in (4, 2))
    value = torch.randn(1, 2, 43, 16).bfloat16()
    mask = varlen.block_mask(BEGINS, 43, torch.float32, 16) if masked else None
    with torch.autocast("cpu", torch.bfloat16):
        found = varlen.attend(nn.Identity(), query, key, value, BEGINS, 20, mask, 0.25)
    rows = (t[0].bfloat16().transpose(0, 1) for t in (query, key, value))
    assert found is not None
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found[0], one_by_one(*rows, BEGINS, 20, 0.25), rtol=2**-7, atol=2**-7)


HALF = torch.bfloat16
REFUSED = [(torch.float32, (16, 16)), (HALF, (20, 20)), (HALF, (264, 264)), (HALF, (16, 8))]


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(("dtype", "sizes"), REFUSED)
def test_what_no_function_takes(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    query, value = (torch.randn(1, 2, 43, size, dtype=dtype) for size in sizes)
    assert varlen.attend(nn.Identity(), query, query, value, BEGINS, 20, None, 1.0) is None


@pytest.mark.parametrize(("dropout", "what"), [(0.0, "the attention of"), (0.1, "attention with dropout of")])
def test_one_by_one_is_said_once_and_not_on_cpu(dropout: float, what: str, recwarn: pytest.WarningsRecorder) -> None:
    attention._said.clear()
    for kind in ("cpu", "mps", "mps"):
        attention._say_one_by_one(kind, dropout)
    attention._said.clear()
    (warning,) = recwarn
    assert f"computes {what} all packed sequences in one call on mps" in str(warning.message)
