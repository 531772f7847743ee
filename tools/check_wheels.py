"""Check wheels for Linux before they are published: `python tools/check_wheels.py dist/*.whl`.

The kernels in a wheel may need no newer glibc than its name promises and no other library than libc and libm, and only
the five functions that celora calls may be seen. Needs readelf.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

_FUNCTIONS = {"celora_tier", "celora_kernel", "celora_use_runtime", "celora_run", "celora_run_part"}
_LIBRARIES = {"libc.so.6", "libm.so.6"}


def faults(wheel: Path) -> list[str]:
    """What is wrong with a wheel for Linux."""
    promised = re.search(r"-manylinux_2_(\d+)_", wheel.name)
    if promised is None:
        return ["its name promises no version of glibc"]
    with zipfile.ZipFile(wheel) as content, tempfile.TemporaryDirectory() as folder:
        libraries = [name for name in content.namelist() if "/kernels-" in name]
        if len(libraries) != 1:
            return [f"it has {len(libraries)} libraries of kernels"]
        command = ["readelf", "--wide", "--dynamic", "--dyn-syms", "--version-info"]
        library = content.extract(libraries[0], folder)
        said = subprocess.run([*command, library], capture_output=True, text=True, check=True).stdout
    newest = max((int(minor) for minor in re.findall(r"Name: GLIBC_2\.(\d+)", said)), default=0)
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", said)) - _LIBRARIES
    # number: value size type GLOBAL visibility section name; what it takes from others has section UND
    seen = set(re.findall(r"^ *\d+: .* (?:GLOBAL|WEAK) +\S+ +\d+ (\S+)", said, re.MULTILINE))
    found = []
    if newest > int(promised[1]):
        found.append(f"it needs glibc 2.{newest}, and its name promises 2.{promised[1]}")
    if needed:
        found.append(f"it needs {', '.join(sorted(needed))}")
    if seen != _FUNCTIONS:
        found.append(f"it shows {', '.join(sorted(seen)) or 'nothing'}")
    return found


def main(wheels: Sequence[str]) -> int:
    """Print what is wrong with each wheel; 1 if anything is, or if there is no wheel."""
    found = {wheel: faults(Path(wheel)) for wheel in wheels}
    for wheel, said in found.items():
        print(f"{wheel}: {'; '.join(said) or 'as promised'}")
    return 1 if any(found.values()) or not found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
