"""What every job knows and nothing touches: errors, settings, source files, table contracts. No engine, no file."""
