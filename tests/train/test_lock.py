"""A directory that one process trains in is closed to others, and open again when it is gone."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcx_kernels.errors import CheckpointError
from dcx_kernels.train.lock import hold

_HOLDER = """
import sys
from pathlib import Path
from dcx_kernels.train.lock import hold
lock = hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def holder(directory: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", _HOLDER, str(directory)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def _elsewhere(directory: Path) -> str:
    """Try to hold it in another process."""
    code = "from pathlib import Path; from dcx_kernels.train.lock import hold; import sys; "
    code += "hold(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def test_another_process_is_kept_out_until_this_one_is_killed(
    directory: Path, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(CheckpointError, match=r"another process is training in .*run: wait"):
        hold(directory)
    holder.kill()
    holder.wait()
    assert hold(directory) is not None


def test_this_process_holds_it_as_often_as_it_likes(directory: Path) -> None:
    first, second = hold(directory), hold(directory)
    assert first is second is not None
    del first
    assert "another process is training" in _elsewhere(directory)
    del second
    gc.collect()
    assert _elsewhere(directory) == ""


def test_a_directory_that_was_removed_is_held_anew(directory: Path) -> None:
    lock = hold(directory)
    shutil.rmtree(directory)
    again = hold(directory)
    assert again is not lock
    assert "another process is training" in _elsewhere(directory)
