"""A checkpoint comes back bit for bit, or says in a sentence why not; the previous one survives."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dcx_kernels.errors import CheckpointError
from dcx_kernels.train import checkpoint
from dcx_kernels.train.atomic import temporary_name

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checkpoint_round_trip_is_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    values = (torch.randn(3, 5) * 3).to(dtype)
    state = {
        "matrix": values,
        "strided": values.t(),
        "alias": values,
        "scalar": values[0, 0],
        "empty": values[:0],
        "nested": {0: (values[1], None, "text", 1 / 3)},
    }
    checkpoint.save(tmp_path / "c", state)
    back = checkpoint.load(tmp_path / "c")
    for name in ("matrix", "strided", "alias", "scalar", "empty"):
        assert back[name].dtype == dtype
        assert torch.equal(back[name], state[name]), name
    assert torch.equal(back["nested"][0][0], values[1])
    assert back["nested"][0][1:] == (None, "text", 1 / 3)


def test_checkpoint_channels_last_tensor_round_trip(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    checkpoint.save(tmp_path / "c", {"w": weight})
    assert torch.equal(checkpoint.load(tmp_path / "c")["w"], weight)


def test_checkpoint_is_one_safetensors_file_with_json_in_its_header(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {"w": torch.zeros(2), "step": 3})
    data = (tmp_path / "c").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    entry = json.loads(header["__metadata__"]["dcx_checkpoint"])
    assert entry["format"] == checkpoint.FORMAT
    assert entry["state"] == {"w": {"$tensor": "w"}, "step": 3}


def test_checkpoint_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "none")


def test_checkpoint_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "c"
    checkpoint.save(path, {"w": torch.randn(50), "v": torch.randn(7)})
    data = path.read_bytes()
    for length in [*range(0, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="truncated or corrupt"):
            checkpoint.load(path)


def test_checkpoint_flipped_bits_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c"
    checkpoint.save(path, {"w": torch.randn(50)})
    data = path.read_bytes()
    for offset in (len(data) - 1, len(data) - 100):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 16]) + data[offset + 1 :])
        with pytest.raises(CheckpointError, match="corrupt"):
            checkpoint.load(path)


def test_checkpoint_garbage(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_bytes(os.urandom(1000))
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        checkpoint.load(path)


def test_checkpoint_other_safetensors_file(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, str(tmp_path / "c"))
    with pytest.raises(CheckpointError, match="not a training checkpoint"):
        checkpoint.load(tmp_path / "c")


def test_checkpoint_of_a_newer_format(tmp_path: Path) -> None:
    metadata = {"dcx_checkpoint": json.dumps({"format": 99, "state": {}})}
    save_file({"w": torch.zeros(2)}, str(tmp_path / "c"), metadata)
    with pytest.raises(CheckpointError, match="expected checkpoint format 1, got 99"):
        checkpoint.load(tmp_path / "c")


def test_checkpoint_disk_full_keeps_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    checkpoint.save(path, {"step": 1, "w": torch.ones(3)})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"No space left on device; the previous one"):
            checkpoint.save(path, {"step": 2, "w": torch.zeros(3)})
    assert not temporary_name(path).exists()
    assert checkpoint.load(path)["step"] == 1
    checkpoint.save(path, {"step": 2, "w": torch.zeros(3)})
    assert checkpoint.load(path)["step"] == 2


_LIMITED = """
import resource, sys, torch
from pathlib import Path
from dcx_kernels.errors import CheckpointError
from dcx_kernels.train import checkpoint
path = Path(sys.argv[1])
checkpoint.save(path, {"step": 1, "w": torch.zeros(100)})
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    checkpoint.save(path, {"step": 2, "w": torch.zeros(100_000)})
except CheckpointError as error:
    print(error)
"""


def test_checkpoint_file_size_limit_keeps_the_previous_one(tmp_path: Path) -> None:
    path = tmp_path / "c"
    command = [sys.executable, "-c", _LIMITED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "could not write checkpoint" in done.stdout
    assert "the previous one is kept" in done.stdout
    assert list(tmp_path.iterdir()) == [path]
    assert checkpoint.load(path)["step"] == 1


def test_checkpoint_refuses_what_json_cannot_hold_and_keeps_the_previous_one(
    tmp_path: Path,
) -> None:
    path = tmp_path / "c"
    checkpoint.save(path, {"step": 1})
    with pytest.raises(TypeError, match="got object"):
        checkpoint.save(path, {"step": object()})
    assert checkpoint.load(path) == {"step": 1}
