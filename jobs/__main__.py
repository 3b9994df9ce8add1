"""`python -m jobs …` and `spark-submit jobs/__main__.py …`: the commands are in `jobs/cli.py`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __package__ in (None, ""):
    # spark-submit puts this file's folder first on the path, where its modules would shadow others.
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    sys.path.insert(0, str(Path(here).parent))

try:
    from jobs.cli import main
except KeyboardInterrupt:  # (nothing has begun)
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
