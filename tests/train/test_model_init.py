"""Settings of the model in `model_init_kwargs`."""

from __future__ import annotations

import re

import pytest

from celora.errors import CELoraError
from celora.train.request.arguments import make_request

OWN = {"model": "m", "data": "d", "output": "out"}


def test_what_is_said_twice_in_model_init_kwargs_is_said_once():
    init = {"torch_dtype": "bfloat16", "attn_implementation": "eager", "revision": "v2", "device_map": "cpu"}
    request = make_request(OWN | {"dtype": "bfloat16", "model_init_kwargs": init})
    assert [request.lora[n] for n in ("dtype", "attn_implementation", "model_revision")] == ["bfloat16", "eager", "v2"]
    assert request.train["model_init_kwargs"] == {"device_map": "cpu"}
    for init, words in (
        ({"dtype": "float32"}, "dtype='float32' in model_init_kwargs, but dtype='bfloat16'; give one of them"),
        ({"use_cach": 1}, "unknown name in model_init_kwargs 'use_cach'; did you mean 'use_cache'"),
        ("use_cache", "expected a mapping"),
    ):
        with pytest.raises(CELoraError, match=re.escape(words)):
            make_request(OWN | {"dtype": "bfloat16", "model_init_kwargs": init})
