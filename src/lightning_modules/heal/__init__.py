"""LoRA healing: train low-rank adapters that bring a pruned model back to the dense one (arXiv 2412.02852)."""
