"""Landing files to `bronze.events` and `bronze.rejects`: reading, typing, repeats, lateness."""
