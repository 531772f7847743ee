"""A sealed folder shows whether its files have changed."""

from __future__ import annotations

import random

import pytest

from celora.errors import CELoraError
from celora.train.output.manifest import MANIFEST, read_manifest, seal, sealed, unseal
from small import written_whole


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "sub" / "b.json").write_text("{}")
    seal(tmp_path, {"step": 5, "seconds": 1.5})
    return tmp_path


def test_sealed_is_whole(folder):
    assert sealed(folder)
    manifest = read_manifest(folder)
    assert (manifest["step"], manifest["seconds"]) == (5, 1.5)
    assert set(manifest["sha256"]) == {"a.bin", "sub/b.json"}
    (folder / "notes.txt").write_text("mine")
    assert read_manifest(folder) == manifest
    unseal(folder)
    assert not sealed(folder)


def test_all_is_on_the_disk_before_the_manifest_says_so(folder, disk):
    seal(folder, {"step": 6})
    before = {path.stat().st_ino for path in (folder, *folder.rglob("*")) if path.name != MANIFEST}
    assert disk[:-4] == [("fsync", number) for _, number in disk[:-4]]
    assert {number for _, number in disk[:-4]} >= before
    assert disk[-4:] == [*written_whole(folder / MANIFEST), ("fsync", folder.parent.stat().st_ino)]


def test_any_flipped_bit_and_any_cut_is_found(folder):
    generator = random.Random(0)
    for name in ("a.bin", "sub/b.json", MANIFEST):
        file = folder / name
        whole = file.read_bytes()
        for _ in range(40):
            at = generator.randrange(len(whole))
            flipped = bytearray(whole)
            flipped[at] ^= 1 << generator.randrange(8)
            for damaged in (bytes(flipped), whole[:at]):
                file.write_bytes(damaged)
                with pytest.raises(CELoraError, match=file.name) as caught:
                    read_manifest(folder)
                assert "\n" not in str(caught.value)
        file.write_bytes(whole)
    (folder / "a.bin").unlink()
    with pytest.raises(CELoraError, match=r"a\.bin is missing"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["a.bin", "sub/b.json", "more", MANIFEST])
def test_a_link_in_a_checkpoint_is_damage(folder, tmp_path_factory, name):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "file"
    elsewhere.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(CELoraError, match=rf"^{name} is a link, and no run saves one"):
        read_manifest(folder)
