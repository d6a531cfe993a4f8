"""Concept erasure: learn which few units a concept needs, and close them (arXiv 2507.13386)."""
