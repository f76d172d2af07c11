"""A wheel, built here, in an environment of its own without a compiler: it trains.

Quick with the torch that is installed already; slow with a newer one, downloaded: one library is
to serve them all.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import discover
import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
NEWER = "2.13.0"
TRAIN = """
import sys
from pathlib import Path
import torch
import torch.nn.functional as F
import dcx_kernels as dcx
from dcx_kernels.kernels import backend
from dcx_kernels.models import vgg19

assert Path(dcx.__file__).is_relative_to(sys.prefix), dcx.__file__
assert backend.choose(torch.device("cpu")).NAME == "native"
loaded = Path("/proc/self/maps").read_text()
assert str(Path(dcx.__file__).parent / "_C_cpu.abi3.so") in loaded
torch.manual_seed(0)
model = dcx.convert(vgg19(num_classes=10, width=0.125), torch.randn(2, 3, 32, 32))
selector = dcx.selectors.CUCB(model.groups, density=0.4, seed=0)
optimizer = dcx.optim.SGD(model, lr=0.01, momentum=0.9)
before = [p.detach().clone() for p in model.parameters()]
model.train()
for _ in range(2):
    model.set_active(selector.select())
    optimizer.zero_grad()
    loss = F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4))
    loss.backward()
    optimizer.step()
assert torch.isfinite(loss)
moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters())]
assert any(moved)
print("trained with torch", torch.__version__)
"""


def _run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build and audit the wheel as `make wheel` does, with folders of its own."""
    lacking = discover.missing("cpu")
    if lacking is not None:
        pytest.skip(lacking)
    folder = tmp_path_factory.mktemp("wheel")
    config = folder / "build.cfg"  # what an earlier build left behind must not be in it
    config.write_text(f"[build]\nbuild_base={folder}/b\n[egg_info]\negg_base={folder}\n")
    build = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, CHECKOUT)
    _run(*build, DCX_BUILD="cpu", DIST_EXTRA_CONFIG=str(config))
    (built,) = folder.glob("*.whl")
    _run(sys.executable, CHECKOUT / "csrc/audit.py", built, folder / "audited")
    (audited,) = (folder / "audited").glob("*.whl")
    return audited


def _environment(folder: Path) -> Path:
    """Make a virtual environment; return its Python."""
    _run(sys.executable, "-m", "venv", "--without-pip", folder)
    return folder / "bin/python"


def _install(python: Path, *what: str | Path) -> None:
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *what)


def _bare(python: Path, *arguments: str, **environment: str) -> str:
    """Run Python where nothing, no compiler above all, is on the PATH."""
    return _run(python, "-P" if sys.version_info >= (3, 11) else "-s", *arguments, PATH="/nowhere",
                DCX_BACKEND="native", PYTHONPATH="", **environment)  # fmt: skip


def test_wheel_is_for_any_python_and_manylinux(wheel: Path) -> None:
    machine = os.uname().machine
    assert wheel.name.endswith(f"-cp310-abi3-manylinux_2_28_{machine}.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "dcx_kernels/_C_cpu.abi3.so" in names
    assert "dcx_kernels/_build.json" in names
    assert not [name for name in names if name.startswith(("csrc", "tests"))]
    modules = {name for name in names if name.endswith(".py")}
    package = (CHECKOUT / "dcx_kernels").rglob("*.py")
    assert modules == {str(path.relative_to(CHECKOUT)) for path in package}


def test_wheel_trains_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    python = _environment(tmp_path / "venv")
    _install(python, "--no-deps", "--no-index", wheel)
    here = sysconfig.get_path("purelib")  # torch and the rest, but for the checkout itself
    (folder,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (folder / "borrowed.pth").write_text(here + "\n")
    assert "trained with torch" in _bare(python, "-c", TRAIN)
    assert "compiler g++" in _bare(python, "-m", "dcx_kernels.cli", "info", COLUMNS="200")


@pytest.mark.slow
@pytest.mark.timeout(1200)  # downloads torch
def test_wheel_trains_with_a_newer_torch(wheel: Path, tmp_path: Path) -> None:
    """The library was compiled against another torch than it is loaded into.

    pip takes torch's build for CPUs (2.13.0+cpu counts as newer than 2.13.0) where one of its
    indexes or ``PIP_FIND_LINKS`` has it, else the one with CUDA, 2 GB and as good for this test.
    """
    python = _environment(tmp_path / "venv")
    _install(python, wheel, f"torch=={NEWER}")
    assert f"trained with torch {NEWER}" in _bare(python, "-c", TRAIN)
