"""The user's cache: nobody else can write there. celora measures again if a stored measurement is damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from celora.machine.cache import cache_folder, keep, recall

OF = {"what": "a product", "shape": [3, 4]}


def test_what_was_measured_is_recalled_for_the_same_thing_alone(home: Path) -> None:
    assert recall(OF) is None
    keep(OF, [1.5, 2.0])
    assert recall(OF) == [1.5, 2.0]
    assert recall(OF | {"shape": [4, 3]}) is None


@pytest.mark.parametrize("spoilt", ["{", "[]", '{"of": {}, "found": [1]}', '{"found": [1]}', "\0"])
def test_a_file_that_says_something_else_is_not_believed(spoilt: str, home: Path) -> None:
    keep(OF, [1.5])
    (file,) = cache_folder("measured").iterdir()
    file.write_text(spoilt)
    assert recall(OF) is None
    keep(OF, [2.5])
    assert recall(OF) == [2.5]


def test_a_file_that_others_could_have_written_is_not_believed(home: Path) -> None:
    keep(OF, [1.5])
    (file,) = cache_folder("measured").iterdir()
    file.chmod(0o666)
    assert recall(OF) is None


def test_with_a_umask_for_groups_it_is_believed_all_the_same(home: Path) -> None:
    before = os.umask(0o002)
    try:
        keep(OF, [1.5])
    finally:
        os.umask(before)
    assert recall(OF) == [1.5]


def test_without_a_cache_nothing_is_kept_and_nothing_fails(home: Path) -> None:
    home.chmod(0o777)
    keep(OF, [1.5])
    assert recall(OF) is None
    assert [file for file in home.rglob("*") if file.is_file()] == []


def test_every_folder_of_the_cache_is_made_for_the_user_alone(home: Path) -> None:
    """This holds for any umask. A user who may write to a parent folder could replace the folder that was checked."""
    before = os.umask(0o002)
    try:
        made = cache_folder("kernels")
    finally:
        os.umask(before)
    assert made == home / ".cache" / "celora" / "kernels"
    for folder in (made, *made.parents[:2]):
        assert folder.stat().st_mode & 0o777 == 0o700, folder


@pytest.mark.parametrize("where", ["cache", "cache/deep", "link", "."])
def test_no_folder_above_the_cache_may_be_open_to_others(
    where: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache" / "deep"
    cache.mkdir(parents=True, mode=0o700)
    (tmp_path / "link").symlink_to(cache)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "link" if where == "link" else cache))
    assert cache_folder("kernels") == cache / "celora" / "kernels"
    opened = cache if where == "link" else (tmp_path / where).resolve()
    opened.chmod(0o775)
    with pytest.raises(PermissionError, match=f"^{opened} could be written to by others"):
        cache_folder("kernels")
    if opened != cache:
        opened.chmod(0o1777)  # like /tmp: nobody can replace another user's files
        assert cache_folder("kernels") == cache / "celora" / "kernels"


def test_folders_of_celora_that_were_made_open_are_closed(home: Path) -> None:
    made = cache_folder("kernels")
    for folder in (made.parent, made):
        folder.chmod(0o775)
    assert cache_folder("kernels") == made
    assert made.stat().st_mode & 0o777 == made.parent.stat().st_mode & 0o777 == 0o700


def test_what_is_above_the_users_home_is_not_looked_at(home: Path) -> None:
    """Folders above the home are not checked: whoever can replace a home can replace the user's programs, too."""
    home.parent.chmod(0o777)
    assert cache_folder("kernels").is_relative_to(home)
    home.chmod(0o777)
    with pytest.raises(PermissionError, match=f"^{home} could be written to by others"):
        cache_folder("kernels")


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give a folder away")
@pytest.mark.parametrize("what", [".cache", ".cache/celora"])
def test_a_folder_of_somebody_else_above_the_cache_is_not_trusted(what: str, home: Path) -> None:
    cache_folder("kernels")
    os.chown(home / what, 12345, -1)
    with pytest.raises(PermissionError, match=f"^{home / what} could be written to by others"):
        cache_folder("kernels")
