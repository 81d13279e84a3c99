"""A table of what a method does to a model."""

import dataclasses
import math

import jax

from jpeft.messages import columns

from .boxes import Box
from .paths import leaf_paths
from .sites import Site
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
    unused: paths of trained entries of theta that reach no output.
  """

  rows: tuple[tuple, ...]
  trainable: int
  total: int
  memory: str
  mergeable: bool
  unused: tuple[str, ...] = ()

  def __str__(self) -> str:
    head = ('site', 'layers', 'class', 'rule', 'theta', 'trainable', 'merges')
    lines = columns([head, *[tuple(map(str, row)) for row in self.rows]])
    share = 'n/a'
    if self.total:
      share = f'{100 * self.trainable / self.total:.3g} %'
    merges = 'mergeable' if self.mergeable else 'not mergeable'
    lines.append(
      f'{self.trainable:,} trainable numbers, {share} of {self.total:,}; {self.memory}; {merges}'
    )
    if self.unused:
      some = ', '.join(self.unused[:3])
      lines.append(f'{len(self.unused)} arrays of theta reach no output: {some}')
    return '\n'.join(lines)


def summary(tuned: Tuned) -> Summary:
  """A table of sites, rules, shapes and counts, from shapes alone.

  Args:
    tuned: from `attach`.
  """
  trained, _ = tuned.split(tuned.shapes)
  rows = []

  def add(name: str, site: Site, where: str, kind: str, mergeable: bool) -> None:
    t = tuned.shapes.get(name, {}).get(site.path, {})
    layers = math.prod(site.theta_lengths)
    numbers = count(trained.get(name, {}).get(site.path, {}))
    merges = 'yes' if mergeable else 'no'
    rows.append((where, layers, kind, name, _shapes(t, site), numbers, merges))

  for rule, site in tuned.rules:
    add(rule.name, site, site.path or '(model)', site.kind, rule.mergeable)
  for name in tuned.generators:
    if '' in tuned.shapes[name]:
      merges = all(rule.mergeable for rule, _ in tuned.rules if rule.name == name)
      add(name, tuned.site_of(name, ''), '(shared)', '-', merges)
  return Summary(
    rows=tuple(rows),
    trainable=count(trained),
    total=count(tuned.backbone),
    memory=tuned.memory,
    unused=tuple(tuned.unused),
    mergeable=tuned.mergeable,
  )


def _shapes(t, site: Site) -> str:
  """The entries of one layer, such as 'kernel.a[768, 8]'."""
  shapes = []
  for name, x in leaf_paths(t).items():
    of_layer = list(x.shape[len(site.theta_lengths) :])
    shapes.append(f'{name.replace("/", ".")}{of_layer}')
  return ' '.join(shapes)
