"""Random keys by name: what is drawn for one thing does not depend on what else there is."""

import zlib

import jax


def named_key(key, name: str):
  """A key for what is called `name`, made of a key for everything; None of None."""
  if key is None:
    return None
  return jax.random.fold_in(key, zlib.crc32(name.encode()))
