"""Build script; everything else is in pyproject.toml.

``DCX_BUILD`` says which native libraries to build: ``auto`` (default: whatever the machine can,
CUDA only if CUDA_HOME is set), ``cpu``, ``cuda`` (both) or ``none``. What is asked for by name must
build; under ``auto`` the package installs without it. How they are built: csrc/README.md.
"""

import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import libraries  # noqa: E402


class BuildNative(Command):
    """Build what DCX_BUILD asks for, beside the package's modules."""

    description = "build the native libraries"
    user_options = []  # noqa: RUF012
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        libraries.build_all(libraries.mode(), self._folder())

    def get_outputs(self) -> list[str]:
        files = map(libraries.file_name, ("cpu", "cuda"))
        found = [self._folder() / name for name in (*files, libraries.RECORD)]
        return [str(path) for path in found if path.is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        files = (path for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".pyc")
        return [str(path.relative_to(ROOT)) for path in files]

    def _folder(self) -> Path:
        return (ROOT if self.editable_mode else Path(str(self.build_lib))) / "dcx_kernels"


class WithLibraries(Distribution):
    """A package for one platform if a library will be in it, else for all."""

    def has_ext_modules(self) -> bool:
        return native


native = None in libraries.wanted(libraries.mode()).values()
build.sub_commands = [*build.sub_commands, ("build_native", None)]
setup(
    cmdclass={"build_native": BuildNative},
    distclass=WithLibraries,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if native else {},
)
