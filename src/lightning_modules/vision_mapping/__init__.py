"""Frozen vision transformer, frozen language model, one linear map between them; see ``README.md``."""
