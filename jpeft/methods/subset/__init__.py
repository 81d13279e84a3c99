"""Methods that train a subset of the backbone itself."""
