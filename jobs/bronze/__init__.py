"""Landing files to `bronze.events` and `bronze.rejects`: which files, typing, repeats, lateness."""
