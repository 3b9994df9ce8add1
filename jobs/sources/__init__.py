"""Logs that are tables of others, as files of the landing: Delta and Iceberg tables, databases."""
