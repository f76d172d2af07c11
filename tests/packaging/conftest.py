"""csrc's Python modules can be imported, and machines made up that lack this or that."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT / "csrc"))

# of the shell only what is built in, so that it runs where PATH holds nothing else
_COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo "g++ (made up) 1.2"; exit; fi
echo "$*" >> {log}
while [ $# -gt 0 ]; do
  case "$1" in -o) out="$2" ;; -MF) rule="$2" ;; -c) source="$2" ;; esac
  shift
done
if [ -n "$source" ] && [ -e {refuse} ]; then echo "$source:1: error: no" >&2; exit 1; fi
if [ -n "$rule" ]; then printf '%s: %s \\\\\\n {header}\\n' "$out" "$source" > "$rule"; fi
echo made > "$out"
"""


class Machine:
    """A machine of which PATH holds nothing at first; ``bin`` is PATH."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin, self.log, self.header = root / "bin", root / "log", root / "shared.h"
        self.refuse = root / "refuse"  # where it exists, nothing compiles
        self.bin.mkdir()
        self.header.touch()

    def add_compiler(self) -> None:
        """Put a g++ on PATH that writes files without compiling and logs how it was called."""
        self.add("g++", _COMPILER.format(log=self.log, header=self.header, refuse=self.refuse))

    def add(self, name: str, text: str = "#!/bin/sh\n") -> Path:
        """Put a script on PATH."""
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def compiled(self) -> list[str]:
        """Return the sources compiled since the last call."""
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        words = [call.split() for call in calls]
        return sorted(Path(call[call.index("-c") + 1]).name for call in words if "-c" in call)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Leave only a made-up machine's PATH, and none of the build's variables."""
    made = Machine(tmp_path)
    monkeypatch.setenv("PATH", str(made.bin))
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "DCX_BUILD", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    return made


@pytest.fixture
def toolkit(tmp_path: Path) -> Callable[..., Path]:
    """Return a maker of CUDA toolkits' roots, whole or without some of their files."""
    parts = {
        "bin/nvcc": "#!/bin/sh\nprintf 'compute_80\\ncompute_90\\ncompute_100\\ncompute_120\\n'\n",
        "include/cuda_runtime.h": "",
        "lib64/libcudart_static.a": "",
    }

    def make(name: str, *without: str, archs: str | None = None) -> Path:
        for part, text in parts.items():
            path = tmp_path / name / part
            if part not in without:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
                path.chmod(0o755)
        if archs is not None:
            lines = "".join(f"compute_{number}\\n" for number in archs.split())
            (tmp_path / name / "bin/nvcc").write_text(f"#!/bin/sh\nprintf '{lines}'\n")
        return tmp_path / name

    return make
