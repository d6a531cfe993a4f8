"""Latent Guard: whether a prompt contains a concept of a list that can be edited at run time (arXiv 2404.08031)."""
