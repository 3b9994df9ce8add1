"""Sequence tables in, session-aware recommenders out."""

import os

# torch's OpenMP threads wait for each other by spinning, some milliseconds. Where others work on
# the machine, too, they spin while the one that is waited for has no core: trainings of many small
# steps were 2 to 15 times slower. A hundredth of the spinning costs nothing that could be measured
# on a quiet machine; none at all costs half the speed there (LAB_LOG.md, 2026-11-26). Read once,
# when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
