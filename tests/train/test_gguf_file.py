"""Damaged or hostile GGUF files are refused in one line, at once. What celora writes can be read back."""

from __future__ import annotations

import os
import struct

import gguf
import numpy as np
import pytest

from celora.errors import CELoraError
from celora.train.formats.gguf_file import Written, check_written, field, open_gguf, read_header, read_tensor

F32 = gguf.GGMLQuantizationType.F32
VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)


def write(path, **more):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_array("names", ["one", "two"])
    for name, value in more.items():
        writer.add_uint32(name, value)
    writer.add_tensor("blk.0.attn_q.weight", VALUES)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(value):
    return struct.pack("<Q", len(value)) + value


def header(tensors=0, entries=0, *rest):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + b"".join(rest)


def tensor(name=b"t", shape=(4,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def lists(count, number):
    """This many lists of this many bytes each."""
    return [text(b"list %d" % i) + struct.pack("<IIQ", 9, 0, count) + bytes(count) for i in range(number)]


def test_a_whole_file_is_read(tmp_path):
    reader = open_gguf(write(tmp_path / "model.gguf"))
    assert field(reader, "general.architecture") == "llama"
    assert field(reader, "names") == ["one", "two"]
    assert field(reader, "nothing") is None
    assert np.array_equal(reader.tensors[0].data, VALUES)


def test_a_header_says_where_the_tensors_are(tmp_path):
    path = write(tmp_path / "model.gguf", number=7)
    header = read_header(path)
    assert header.architecture == "llama"
    assert header.fields["number"] == 7
    assert header.fields["names"] is None  # a list of words is left out
    tensor = header.tensors["blk.0.attn_q.weight"]
    assert (tensor.shape, tensor.kind) == ((3, 4), F32)
    assert path.read_bytes()[tensor.start :][: tensor.nbytes] == VALUES.tobytes()


def test_a_tensor_of_a_type_that_is_not_unpacked_is_one_line(tmp_path):
    path = tmp_path / "model.gguf"
    head = header(1, 0, tensor(kind=gguf.GGMLQuantizationType.F64))
    path.write_bytes(head + bytes(-len(head) % 32 + 32))
    read = read_header(path)
    with pytest.raises(CELoraError, match="is no GGUF file that can be read"):
        read_tensor(read, read.tensors["t"])


def test_a_header_that_is_too_long_is_refused(tmp_path):
    with (tmp_path / "model.gguf").open("wb") as file:
        file.write(header(0, 1, text(b"a"), struct.pack("<IQ", 8, 2**28)))
        file.truncate(2**29)  # a sparse file
    with pytest.raises(CELoraError, match="its header is longer than 256 MiB"):
        read_header(tmp_path / "model.gguf")


def test_a_file_is_cut_off_anywhere(tmp_path):
    whole = write(tmp_path / "model.gguf").read_bytes()
    padding = -VALUES.nbytes % 32  # of the last tensor; cutting it loses nothing
    for length in range(len(whole) - padding):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(CELoraError, match=r"is no GGUF file that can be read: it"):
            open_gguf(tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\3\4" + bytes(99), "it does not begin as a GGUF file does"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(99), "it is of version 50331648"),
        (header(2**60), "it says that it has 1,152,921,504,606,846,976 tensors"),
        (header(0, 2**60), "metadata entries, and the most that is read is 65,536"),
        (header(0, 1, text(b"a" * 70_000)), "bytes in a name"),
        (header(0, 1, text(b"a"), struct.pack("<I", 77)), "a value of type 77, which is unknown"),
        (header(0, 1, text(b"a"), struct.pack("<IIQ", 9, 0, 2**62)), "entries in a list"),
        (header(0, 1, text(b"a"), struct.pack("<IIQ", 9, 4, 2**20)), "it ends in the middle of its header"),
        (header(0, 1, text(b"a"), struct.pack("<IIQ", 9, 9, 1)), "a list of values of type 9"),
        (header(0, 1, text(b"a"), struct.pack("<IQ", 8, 2**63)), "it ends in the middle of its header"),
        (header(0, 1, text(b"general.alignment"), struct.pack("<II", 4, 2**31)), "bytes of alignment"),
        (header(1, 0, tensor(shape=(4,) * 9)), "dimensions"),
        (header(1, 0, tensor(kind=200)), "its tensor 't' is stored as type 200, which is unknown"),
        (header(1, 0, tensor(shape=(31,), kind=8)), r"its tensor 't' cannot have the shape \[31\]"),
        (header(1, 0, tensor(shape=(2**62, 2**62))), "bytes behind its end: it is cut off"),
        (header(1, 0, tensor(offset=2**63)), "bytes behind its end: it is cut off"),
        (header(0, 1, text(b"a"), struct.pack("<IQ", 8, 2**29), bytes(99)), "it ends in the middle of its header"),
        (header(0, 3, *lists(2**21, 3)), "entries in a list, and the most that is read is 0"),
        (header(2, 0, tensor(), tensor(), bytes(99)), "two of its tensors have the same name"),
        (header(0, 2, *[text(b"a") + struct.pack("<IB", 7, 1)] * 2, bytes(99)), "has the metadata entry 'a' twice"),
        (header(0, 1, text(b"general.alignment"), struct.pack("<II", 4, 3), bytes(99)), "its alignment is"),
        (header(0, 1, text(b"general.alignment"), struct.pack("<II", 4, 0), bytes(99)), "its alignment is"),
    ],
)
def test_a_hostile_header_is_refused_at_once(content, said, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CELoraError, match=said) as caught:
        open_gguf(tmp_path / "model.gguf")
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(CELoraError, match=r"cannot read .*: No such file"):
        open_gguf(tmp_path / "none.gguf")
    with pytest.raises(CELoraError, match=r"cannot read .*: Is a directory"):
        open_gguf(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.gguf")
        with pytest.raises(CELoraError, match="a pipe or a device"):
            open_gguf(tmp_path / "pipe.gguf")


def test_what_was_written_is_compared(tmp_path):
    path = write(tmp_path / "model.gguf")
    stated, tensors = {"general.architecture": "llama"}, {"blk.0.attn_q.weight": Written.of((3, 4), F32, VALUES)}
    assert check_written(path, stated, tensors) == 1
    with pytest.raises(CELoraError, match=r"reads back general.architecture as 'llama', and 'gemma' was written"):
        check_written(path, {"general.architecture": "gemma"}, tensors)
    for wrong in (
        {},
        tensors | {"more": Written.of((3, 4), F32, VALUES)},
        {"blk.0.attn_q.weight": Written.of((4, 3), F32, VALUES)},
        {"blk.0.attn_q.weight": Written.of((3, 4), F32, VALUES + 1)},
    ):
        with pytest.raises(CELoraError, match=r"does not read back as it was written: .* differs; check the disk"):
            check_written(path, stated, wrong)
