"""What keeps a lake well: drift, packing and vacuum, lineage, what the model registry pins. May import `models`."""
