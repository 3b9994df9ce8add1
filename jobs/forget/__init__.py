"""Erases a person from tables, older versions, landing files, caches and registered runs."""
