"""CLIP: the judge of what a picture shows."""
