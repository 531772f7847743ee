"""Reads the tensors of a checkpoint one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from celora import CELoraError
from celora.errors import Damaged
from celora.weights.checkpoint import Origin, stored_itemsize, stored_tensors

A, B = torch.arange(6.0).view(2, 3), torch.ones(4, dtype=torch.bfloat16)


def in_two_files(folder: Path) -> str:
    save_file({"model.a": A}, folder / "one.safetensors")
    save_file({"model.b": B}, folder / "two.safetensors")
    index = {"weight_map": {"model.a": "one.safetensors", "model.b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(folder)


def in_one(folder: Path) -> str:
    save_file({"model.a": A, "model.b": B}, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("write", [in_one, in_two_files])
def test_tensors_are_read_from_one_file_or_several(tmp_path: Path, write: object) -> None:
    found = stored_tensors(write(tmp_path))  # type: ignore[operator]
    assert list(found) == ["model.a", "model.b"]
    assert found["model.a"].read().equal(A)
    assert found["model.b"][...].equal(B)
    assert (found["model.b"].get_shape(), found["model.b"].get_dtype()) == ([4], "BF16")


def test_an_origin_is_found_with_and_without_the_prefix(tmp_path: Path) -> None:
    folder = in_one(tmp_path)
    assert Origin(folder, None, "model.a").read().equal(A)
    assert Origin(folder, None, "outer.model.a").read().equal(A)
    with pytest.raises(CELoraError, match=r"holds no 'model.c'"):
        Origin(folder, None, "model.c").read()


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(CELoraError, match=r"holds neither model.safetensors nor"):
        stored_tensors(str(tmp_path))
    folder = in_two_files(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CELoraError, match=r"lacks two.safetensors, which its index lists"):
        stored_tensors(folder)
    with pytest.raises(CELoraError):
        Origin(str(tmp_path / "nowhere"), None, "a").read()


def test_the_head_of_a_file_says_how_many_bytes_a_number_has(tmp_path: Path) -> None:
    assert stored_itemsize(str(tmp_path)) == 4  # nothing is known of it
    save_file({"b": B}, tmp_path / "model.safetensors")
    assert stored_itemsize(str(tmp_path)) == 2


@pytest.mark.parametrize("size", [0, 7, 40, -3])
def test_a_file_that_is_cut_off_is_one_line(tmp_path: Path, size: int) -> None:
    folder = in_one(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    for read in (stored_tensors, stored_itemsize, Origin(folder, None, "model.a").read):
        with pytest.raises(CELoraError, match=r"model.safetensors' is damaged: .*; fetch it again"):
            read(*[folder] * (read in (stored_tensors, stored_itemsize)))
    with pytest.raises(Damaged):
        stored_tensors(folder)
