"""What a line of a log is before it is typed: bytes, lines, records, and what is computed of them."""
