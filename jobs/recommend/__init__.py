"""`gold.sequences` and a registered model to `gold.recommendations`. May import `models`."""
