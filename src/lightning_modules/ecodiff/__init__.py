"""EcoDiff: learn which heads and neurons a text-to-image model can do without (arXiv 2412.02852)."""
