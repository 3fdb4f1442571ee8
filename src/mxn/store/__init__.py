"""The store: from a model's name to checked files on this disk. Fetched once, converted once, never half-written."""
