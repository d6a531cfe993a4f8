"""Can a vision model see the hidden shape? See ``README.md``."""
