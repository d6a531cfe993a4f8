"""Safelight: make generative models safe, small and understandable."""

if __name__ == "src":
    raise ImportError("import 'safelight', not 'src': a second copy of every class would break isinstance and pickling")

__version__ = "0.1.0"
