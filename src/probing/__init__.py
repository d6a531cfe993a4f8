"""Look into a network while it computes, and take apart what is there: activations by path, and sparse dictionaries."""
