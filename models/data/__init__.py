"""`gold` tables at a pinned version as flat arrays; splits, vocabularies, catalogues."""
