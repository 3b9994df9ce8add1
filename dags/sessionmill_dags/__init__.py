"""What the DAG files are made of: an installed package, so that DAG files hold no code."""
