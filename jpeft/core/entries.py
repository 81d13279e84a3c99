"""Entries of theta by name: which are trained, which keep their dtype."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .paths import leaf_paths


def entry_path(path: Sequence[Any]) -> tuple[str, ...]:
  """The keys of a path of `jax.tree_util` as text."""
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def names_entry(name: str, path: Sequence[str]) -> bool:
  """Whether a name of `fixed` or `exact` means the entry at a path, or a dict around it.

  Args:
    name: keys joined by '/', from the root of one rule's theta at one site; '*' is any one key.
    path: keys of the entry, from the same root.
  """
  keys = name.split('/')
  if len(keys) > len(path):
    return False
  return all(key in ('*', there) for key, there in zip(keys, path, strict=False))


def unused_name(names: Iterable[str], trees: Sequence[Any]) -> str | None:
  """The first name that means no entry of any of some trees."""
  paths = [path.split('/') for tree in trees for path in leaf_paths(tree)]
  for name in names:
    if not any(names_entry(name, path) for path in paths):
      return name
  return None


def cast(t, dtype, exact: Iterable[str] = ()):
  """t with its floats in another dtype, but for the entries that `exact` names."""

  def leaf(path, x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
      return x
    if any(names_entry(name, entry_path(path)) for name in exact):
      return x
    return x.astype(dtype)

  return jax.tree_util.tree_map_with_path(leaf, t)


def partition(tree, chosen) -> tuple[Any, Any]:
  """(the leaves of a tree that are chosen, the others): None stands in the other's places.

  Args:
    tree: a pytree without None.
    chosen: bools in the same structure.
  """
  first = jax.tree.map(lambda x, is_first: x if is_first else None, tree, chosen)
  second = jax.tree.map(lambda x, is_first: None if is_first else x, tree, chosen)
  return first, second


def combine(first, second):
  """The tree that `partition` took apart."""
  return jax.tree.map(
    lambda a, b: b if a is None else a, first, second, is_leaf=lambda x: x is None
  )


def trained(theta, fixed) -> Any:
  """A tree of bools: False for integers, booleans and the entries that are named.

  Args:
    theta: {name of a rule: {path: entries}}.
    fixed: {(name of a rule, path): names of entries, see `Weight.fixed`}.
  """

  def is_trained(path, x):
    if not jnp.issubdtype(x.dtype, jnp.inexact):
      return False
    rule, site, *entry = entry_path(path)
    return not any(names_entry(name, entry) for name in fixed.get((rule, site), ()))

  return jax.tree_util.tree_map_with_path(is_trained, theta)


def named(theta, names) -> Any:
  """A tree of bools: True for the entries that are named.

  Args:
    theta: {name of a rule: {path: entries}}.
    names: {(name of a rule, path): names of entries}.
  """

  def is_named(path, x):
    rule, site, *entry = entry_path(path)
    return any(names_entry(name, entry) for name in names.get((rule, site), ()))

  return jax.tree_util.tree_map_with_path(is_named, theta)


def stop_where(theta, is_trained):
  """theta with stop_gradient where a tree of bools is False."""
  return jax.tree.map(lambda x, keeps: x if keeps else stop_gradient(x), theta, is_trained)


def stop_gradient(x):
  """A leaf without gradient; integers and keys have none."""
  if hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.inexact):
    return jax.lax.stop_gradient(x)
  return x
