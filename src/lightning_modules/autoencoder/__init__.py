"""Autoencoder: the latent space of the zoo's text-to-image models."""
