"""Build script; everything else is in pyproject.toml.

``DCX_BUILD`` says which native libraries to build: ``auto`` (default: whatever the machine can),
``cpu``, ``cuda`` or ``none``. Today csrc/ is empty and the package is pure Python, so ``auto`` and
``none`` build the same thing, and asking for a library by name is an error instead of a package
that silently lacks it. Nothing here uses the network or imports torch.
"""

import os

from setuptools import setup

build = os.environ.get("DCX_BUILD", "auto")
if build not in {"auto", "cpu", "cuda", "none"}:
    raise SystemExit(f"DCX_BUILD: expected auto, cpu, cuda or none, got {build!r}")
if build in {"cpu", "cuda"}:
    raise SystemExit(f"DCX_BUILD={build}: there is no native library yet (csrc/ is empty)")

setup()
