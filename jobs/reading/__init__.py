"""Files of a log to records: the columns that the source file names, as text, and the raw line."""
