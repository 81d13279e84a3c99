"""Paths of modules and arrays, and the names of what is stored beside a module's parameters."""

import re
from collections.abc import Iterable
from typing import Any

import jax

# Extra variables on their way into a module: theta and random keys.
EXTRAS = 'jpeft'
# Recorded arrays on their way out of it.
TAP = 'jpeft_tap'
# The kinds of recorded arrays: for the method itself, beside the output, new state of theta.
TAPPED = 'tap'
AUX = 'aux'
WRITTEN = 'written'


def join_path(*parts: str) -> str:
  """The parts of a path that are not empty, joined by '/'."""
  return '/'.join(part for part in parts if part)


# Stands for a '/' in the name of an array, such as 'kernel/scale' of `nn.WeightNorm`.
_SLASH = '%2F'


def key_path(keys: Iterable[Any]) -> str:
  """The path of an array, from the keys of the dicts or attributes that it lies under."""
  return '/'.join(str(key).replace('/', _SLASH) for key in keys)


def path_keys(path: str) -> tuple[str, ...]:
  """The keys that `key_path` joined."""
  return tuple(key.replace(_SLASH, '/') for key in path.split('/'))


def leaf_paths(tree: Any) -> dict[str, Any]:
  """{'/'-joined path: leaf} of a pytree, in the order of its leaves."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in flat}


def natural(path: str) -> list[tuple[int, str]]:
  """A sort key that puts block_10 after block_9."""
  key = []
  for token in re.split(r'(\d+)', path):
    if token.isdigit():
      key.append((int(token), ''))
    else:
      key.append((-1, token))
  return key
