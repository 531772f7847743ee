"""A wheel brings the kernels compiled, so that no compiler is needed where it is installed.

`CELORA_WHEEL_PLATFORM` names another platform, as in `macosx_11_0_arm64`, for which `CELORA_CC` compiles; `any` makes a
wheel without them, as a machine without a compiler does.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_C = Path("src", "celora", "kernels", "c")
_SYSTEMS = {"macosx": "Darwin", "win": "Windows"}
_ENDINGS = {"Darwin": "dylib", "Windows": "dll"}


class KernelsHook(BuildHookInterface):  # type: ignore[type-arg]
    """Compiles them into the wheel; see above."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        asked = os.environ.get("CELORA_WHEEL_PLATFORM", "")
        if version == "editable" or asked == "any":
            return
        named = os.environ.get("CELORA_CC")
        # On Windows gcc aligns the stack to 16 bytes, whatever a vector needs (its bug 54412).
        usual = () if platform.system() == "Windows" else ("cc", "gcc", "clang")
        compilers = [shlex.split(named)] if named else [[found] for c in usual if (found := shutil.which(c))]
        compiling = self._compiling()
        for compiler in compilers:
            try:
                library, tag = self._compile(compiling, compiler, asked)
            except (OSError, subprocess.SubprocessError) as error:
                said = compiling.reason(error)
                self.app.display_warning(f"{shlex.join(compiler)} could not compile the kernels: {said}")
                continue
            build_data["tag"], build_data["pure_python"] = f"py3-none-{tag}", False
            build_data["force_include"][str(library)] = f"celora/kernels/c/compiled/{library.name}"
            return
        if asked:
            raise RuntimeError(f"no compiler made the kernels for {asked}: set CELORA_CC to one that can.")
        self.app.display_warning("No compiler made the kernels: this wheel brings none.")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self.folder.cleanup()

    def _compiling(self) -> ModuleType:
        """`compiling.py`, as a wheel is built where celora cannot be imported."""
        spec = importlib.util.spec_from_file_location("compiling", Path(self.root, _C, "compiling.py"))
        assert spec is not None
        assert spec.loader is not None
        compiling = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(compiling)
        return compiling

    def _compile(self, compiling: ModuleType, compiler: list[str], asked: str) -> tuple[Path, str]:
        """The library, whose name says its content (build.py looks), and the platform that it is for."""
        system, machine = platform.system(), platform.machine()
        if asked:
            found = re.fullmatch(r"(manylinux|linux|macosx|win)(?:_[0-9_]+?)?_(x86_64|amd64|aarch64|arm64)", asked)
            if found is None:
                raise RuntimeError(f"CELORA_WHEEL_PLATFORM={asked} is no platform; try manylinux_2_28_aarch64.")
            system, machine = _SYSTEMS.get(found[1], "Linux"), found[2]
        built = Path(self.folder.name, "kernels")
        os.environ["MACOSX_DEPLOYMENT_TARGET"] = "11.0"  # which the tag promises
        tiers = compiling.compile_library(compiler, built, architecture=machine, system=system)
        content = built.read_bytes()
        self.app.display_info(f"kernels for {system} on {machine}: {', '.join(tiers)}, {len(content) // 1024} KiB")
        library = built.with_name(f"kernels-{hashlib.sha256(content).hexdigest()[:16]}.{_ENDINGS.get(system, 'so')}")
        built.rename(library)
        return library, asked or _native(system, machine, content)


def _native(system: str, machine: str, content: bytes) -> str:
    """The tag of what was compiled for this machine: on Linux, by the newest symbol of glibc that it needs."""
    if system == "Darwin":
        return f"macosx_11_0_{machine}"
    if system == "Windows":
        return f"win_{machine.lower()}"
    needed = [int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", content)]
    return f"manylinux_2_{max(17, *needed)}_{machine}" if needed else f"linux_{machine}"
