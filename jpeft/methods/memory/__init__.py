"""Methods that shrink what the backward pass keeps."""
