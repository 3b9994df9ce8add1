"""A registered model's answers from raw events. Imports nothing of `jobs`, and no table."""
