"""`silver.sessions` to `gold.items`, `gold.item_attributes` and `gold.sequences`."""
