"""Text to image: the trainer of the zoo's pipelines."""
