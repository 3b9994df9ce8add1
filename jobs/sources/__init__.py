"""Logs that are tables of others, as files of the landing: Delta tables, databases."""
