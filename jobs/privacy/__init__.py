"""Who a line is about: pseudonyms, erased users, and an id in all its spellings."""
