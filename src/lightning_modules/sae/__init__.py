"""Sparse autoencoders of sae-lens, trained on any activations with Lightning."""
