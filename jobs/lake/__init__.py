"""How tables and files are read and written: file systems, Delta through delta-rs and Spark, tasks, a run's context."""
