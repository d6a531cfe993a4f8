"""MoE-X: a language model whose experts are sparse enough to read (arXiv 2503.07639)."""
