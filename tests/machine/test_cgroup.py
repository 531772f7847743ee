from __future__ import annotations

from pathlib import Path

import pytest

from celora.machine.cgroup import allowed_cpus, free_memory
from patching import patch_all

STAT = "anon 300000\ninactive_file 500000\ntotal_inactive_file 400000\n"


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    patch_all(monkeypatch, "celora.machine.cgroup:_ROOT", tmp_path / "cgroup")
    patch_all(monkeypatch, "celora.machine.cgroup:_MINE", tmp_path / "mine")
    return tmp_path


def _write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_a_machine_without_groups_has_no_limits(groups: Path) -> None:
    assert free_memory() is None
    assert allowed_cpus() is None
    (groups / "mine").write_text("0::/user.slice\n")
    _write(groups / "cgroup" / "user.slice", memory__max="max\n", memory__current="1\n", memory__stat=STAT)
    assert free_memory() is None


@pytest.mark.parametrize("mine", [None, "0::/\n", "0::/../../job\n", "0::/unseen/job\n"])
def test_a_container_sees_its_own_group_as_the_outermost(mine: str | None, groups: Path) -> None:
    if mine is not None:
        (groups / "mine").write_text(mine)
    root = groups / "cgroup"
    _write(root, memory__max="1000000\n", memory__current="900000\n", memory__stat=STAT, cpu__max="400000 100000\n")
    assert free_memory() == 600000
    assert allowed_cpus() == 4


def test_the_tightest_of_the_groups_around_a_process_counts(groups: Path) -> None:
    """As for a job of a cluster, or in a container that sees the groups of its host."""
    (groups / "mine").write_text("0::/system.slice/job_7.scope\n")
    system = groups / "cgroup" / "system.slice"
    _write(system, memory__max="1000000\n", memory__current="200000\n", memory__stat=STAT, cpu__max="150000 100000\n")
    _write(
        system / "job_7.scope", memory__max="max\n", memory__current="1\n", memory__stat=STAT, cpu__max="max 100000\n"
    )
    assert free_memory() == 1300000
    assert allowed_cpus() == 1
    _write(system / "job_7.scope", memory__max="700000\n", cpu__max="50000 100000\n")
    assert free_memory() == 1199999
    assert allowed_cpus() == 1


@pytest.mark.parametrize("within", ["", "docker/abc"])
def test_version_1_has_a_tree_for_each_resource(within: str, groups: Path) -> None:
    (groups / "mine").write_text(
        "12:devices:/\n5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n0::/x\n"
    )
    root = groups / "cgroup"
    _write(
        root / "memory" / within,
        memory__limit_in_bytes="800000\n",
        memory__usage_in_bytes="700000\n",
        memory__stat=STAT,
    )
    _write(root / "cpu" / within, cpu__cfs_quota_us="250000\n", cpu__cfs_period_us="100000\n")
    assert free_memory() == 500000
    assert allowed_cpus() == 2
    _write(root / "cpu" / within, cpu__cfs_quota_us="-1\n")
    assert allowed_cpus() is None
