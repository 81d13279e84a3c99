"""A table of what a method does to a model."""

import dataclasses
import math

import jax

from .boxes import Box
from .rules import memory_class
from .tuned import Tuned


def count(tree) -> int:
  """How many numbers a tree holds; shapes will do."""
  leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Box))
  return sum(math.prod(x.shape) for x in leaves)


@dataclasses.dataclass(frozen=True)
class Summary:
  """What `summary` found; prints as a table.

  Attributes:
    rows: (site path, layers, class, rule, shapes of one layer's theta, trainable numbers,
      mergeable).
    trainable: numbers that the optimizer sees.
    total: numbers of the backbone.
    memory: the memory class: what the backward pass must keep of the backbone.
    mergeable: whether `merge` gives plain weights.
  """

  rows: tuple[tuple, ...]
  trainable: int
  total: int
  memory: str
  mergeable: bool

  def __str__(self) -> str:
    head = ('site', 'layers', 'class', 'rule', 'theta', 'trainable', 'merges')
    rows = [head, *[tuple(map(str, row)) for row in self.rows]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
      '  '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    share = f'{100 * self.trainable / self.total:.3g} %' if self.total else 'n/a'
    return '\n'.join(
      [
        *lines,
        f'{self.trainable:,} trainable numbers, {share} of {self.total:,}; '
        f'{self.memory}; {"mergeable" if self.mergeable else "not mergeable"}',
      ]
    )


def summary(tuned: Tuned) -> Summary:
  """A table of sites, rules, shapes and counts, from shapes alone.

  Args:
    tuned: from `attach`.
  """
  theta, rows, trainable = tuned.shapes, [], 0
  kept = tuned.trainable(theta)
  for rule, site in tuned.rules:
    t, keep = (tree.get(rule.name, {}).get(site.path, {}) for tree in (theta, kept))
    numbers = sum(
      math.prod(x.shape)
      for x, k in zip(jax.tree.leaves(t), jax.tree.leaves(keep), strict=True)
      if k
    )
    trainable += numbers
    shapes = ' '.join(f'{name}{list(x.shape[len(site.lengths) :])}' for name, x in _named(t))
    merges = 'no' if (rule, site) in tuned.unmergeable else 'yes'
    rows.append(
      (site.path or '(model)', site.layers, site.kind, rule.name, shapes, numbers, merges)
    )
  return Summary(
    tuple(rows),
    trainable,
    count(tuned.backbone),
    memory_class(rule for rule, _ in tuned.rules),
    tuned.mergeable,
  )


def _named(tree):
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [
    ('.'.join(str(getattr(k, 'key', getattr(k, 'idx', k))) for k in path), x) for path, x in flat
  ]
