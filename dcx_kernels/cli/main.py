"""Read the command, run its function, turn known errors into one sentence and an exit code.

Exit codes: 0 done; 1 training had to stop; 2 bad input, or a file that cannot be read or written;
130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from dcx_kernels.cli.parser import build_parser
from dcx_kernels.errors import CheckpointError, DataError, NonFiniteError

__all__ = ["COMMANDS", "main"]

# an ImportError names the package that an option needs
_KNOWN = (CheckpointError, DataError, ImportError, NonFiniteError, OSError, ValueError)

_CONTINUE = {
    "train": "; the same command with --resume continues",
    "reproduce": "; the same command continues",
}


def _train(**options: object) -> int:
    from dcx_kernels.cli.train import train

    return train(**options)  # type: ignore[arg-type]


def _inspect(**options: object) -> int:
    from dcx_kernels.cli.inspect import inspect

    return inspect(**options)  # type: ignore[arg-type]


def _export(**options: object) -> int:
    from dcx_kernels.cli.export import export

    return export(**options)  # type: ignore[arg-type]


def _reproduce(**options: object) -> int:
    from dcx_kernels.cli.reproduce import reproduce

    return reproduce(**options)  # type: ignore[arg-type]


def _info(**options: object) -> int:
    from dcx_kernels.cli.info import info

    return info(**options)


COMMANDS: dict[str, Callable[..., int]] = {
    "train": _train,
    "inspect": _inspect,
    "export": _export,
    "reproduce": _reproduce,
    "info": _info,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``dcx`` with these arguments (the process's own if None) and return its exit code."""
    options = vars(build_parser().parse_args(arguments))
    command, traceback = options.pop("command"), options.pop("traceback")
    try:
        return COMMANDS[command](**options)
    except KeyboardInterrupt:
        print(f"dcx {command}: interrupted{_CONTINUE.get(command, '')}", file=sys.stderr)
        return 130
    except _KNOWN as error:
        if traceback:
            raise
        print(f"dcx {command}: {_sentence(error)}", file=sys.stderr)
        return 1 if isinstance(error, NonFiniteError) else 2


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f" {error.filename}" if error.filename else ""
        return f"{error.strerror}:{where}" if where else error.strerror
    return str(error) or type(error).__name__
