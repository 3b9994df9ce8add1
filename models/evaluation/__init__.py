"""Metrics with intervals, full rankings, stored models scored again."""
