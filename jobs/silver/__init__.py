"""`bronze.events` to `silver.sessions`: the session rule, cut anew or around what changed."""
