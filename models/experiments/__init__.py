"""Grids, scaling laws, and the tables of result documents."""
