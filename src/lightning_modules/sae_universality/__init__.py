"""Do sparse autoencoders of different language models find the same features? (arXiv 2410.06981)."""
