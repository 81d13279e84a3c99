"""The two frameworks behind one set of functions: Linen and NNX."""
