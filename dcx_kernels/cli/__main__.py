"""``python -m dcx_kernels.cli`` is ``dcx``."""

from __future__ import annotations

import sys

from dcx_kernels.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
