"""The commands of `python -m models`. Of each: its options, and what it runs with the parsed options, the
source and the lake; it prints a paragraph and returns what `--json` prints. Nothing heavy is imported
before a command needs it."""
