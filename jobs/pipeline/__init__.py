"""The order of the jobs, their steps, and what `ops.runs` records of them."""
