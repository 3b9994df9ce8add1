"""`python -m models …`: the commands are listed in `models/cli.py`."""

from __future__ import annotations

import sys

try:
    from models.cli import main
except KeyboardInterrupt:  # (nothing has begun)
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
