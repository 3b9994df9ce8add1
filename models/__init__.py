"""Sequence tables in, session-aware recommenders out."""

import os

# torch's OpenMP threads wait for each other by spinning, some milliseconds. Where others work on
# the machine, too, they spin while the one that is waited for has no core, and trainings of many
# small steps are held up. A hundredth of the spinning was twice as fast beside two busy processes,
# and within noise on a quiet machine; none at all costs half the speed there (LAB_LOG.md,
# 2026-11-26). Read once, when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
