"""Edits of theta and of the optimizer's state, after an update."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .blame import blame
from .keys import named_key
from .paths import leaf_paths
from .rules import Rule, Weight
from .sites import Site


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Around:
  """What an edit may ask beside theta; without leaves, so that a State may pass through `cond`.

  Attributes:
    sites, backbone: see `State.sites` and `State.each_layer`; the latter takes a Site here.
  """

  sites: Mapping[str, Site]
  backbone: Callable[..., Any] | None

  def each_layer(self, path: str, fn: Callable, *trees):
    """`State.each_layer`."""
    assert self.backbone is not None
    return self.backbone(self.sites[path], fn, *trees)


class State(NamedTuple):
  """What an `edit` gets and returns: one method's part of a training state.

  Attributes:
    theta: {site path: entries} after the optimizer's update; in stacked layers the stack comes
      first. Of a method that `generated` made it is the smaller tree.
    before: the same before the update. What is returned here is not read.
    moments: trees like theta, of what the optimizer keeps for each number, such as the mean and the
      variance of Adam in this order; None in the places of what is not trained. What it keeps for
      each vector (`Weight.restarts`) has axes of one number.
    steps: how many updates are made in all; None where that is not known.
    around: what `sites` and `each_layer` read.
  """

  theta: Mapping[str, Any]
  before: Mapping[str, Any]
  moments: tuple[Mapping[str, Any], ...]
  steps: int | None = None
  around: Around | None = None

  @property
  def sites(self) -> Mapping[str, Site]:
    """{site path: Site} of theta."""
    return {} if self.around is None else self.around.sites

  @property
  def each_layer(self) -> Callable[..., Any] | None:
    """Reads kernels; None where the backbone is not given.

    It is (site path, fn, *trees) -> fn(arrays, *what the trees have of a layer) for all layers of
    the site, one after the other, with the stack in front. `arrays` are those of the backbone, as
    `init` gets them.
    """
    if self.around is None or self.around.backbone is None:
      return None
    return self.around.each_layer

  def updates(self, what: str) -> int:
    """How many updates are made in all.

    Args:
      what: of the method depends on it, for the error.

    Raises:
      ValueError: that is not known.
    """
    if self.steps is None:
      raise ValueError(
        f'{what} depends on how many updates are made in all: give Tuned.edit the number, as steps='
      )
    return self.steps


def edited(
  rules: Sequence[tuple[Rule, Site]],
  before,
  theta,
  trained,
  optimizer,
  grads,
  step,
  key,
  steps: int | None = None,
  each_layer: Callable[..., Any] | None = None,
) -> tuple[Any, Any]:
  """(theta, optimizer) after the `edit` of each rule, once for each name.

  Args:
    rules: with their sites.
    before: theta before the update.
    theta: after it.
    trained: what is trained of theta before the update, from `Tuned.split`.
    optimizer: the state of an Optax transform of what is trained.
    grads: of what is trained.
    step: how many updates were made.
    key: a random key.
    steps: how many are made in all, if that is known.
    each_layer: (site, fn, *trees), see `State`; None without a backbone.

  Raises:
    ValueError: an edit returns something else than it got, or the optimizer keeps no moments in the
      shape of each entry.
  """
  edits = {(rule.name, rule.edit): (rule, site) for rule, site in rules if rule.edit}
  if not edits:
    return theta, optimizer
  moments = Moments.of(optimizer, trained)
  trees = moments.trees
  _check_counts(edits.values(), moments)
  for rule, site in edits.values():
    own_key = named_key(key, f'edit of {rule.name}')
    sites = {own.path: own for other, own in rules if other.name == rule.name}
    around = Around(sites, each_layer)
    theta, trees = _edited(rule, site, before, theta, trees, grads, step, own_key, steps, around)
  return theta, moments.put_back(trees)


def _check_counts(edits: Iterable[tuple[Rule, Site]], moments: 'Moments') -> None:
  """Raises a ValueError if single vectors restart under a count of updates that all share."""
  for rule, _ in edits:
    if isinstance(rule, Weight) and rule.restarts and moments.one_count:
      raise ValueError(
        f'{rule.name} clears the moments of single vectors, and the optimizer counts the updates '
        'of all together: give tuned to it, jpeft.optim.by_vector(tuned, optax.scale_by_adam()), '
        'in place of optax.scale_by_adam()'
      )


def _edited(
  rule: Rule,
  site: Site,
  before,
  theta,
  moments: list,
  grads,
  step,
  key,
  steps: int | None,
  around: Around,
) -> tuple[Any, list]:
  """(theta, moments) after the `edit` of a rule.

  Args:
    rule: with the edit.
    site: any of its sites, for errors.
    before: theta before the update.
    theta: after it.
    moments: trees like what is trained of theta.
    grads: of what is trained of theta.
    step: how many updates were made.
    key: a random key.
    steps: how many are made in all, if that is known.
    around: what the edit may ask beside.

  Raises:
    ValueError: the edit returns something else than it got, or changes shapes.
  """
  name = rule.name
  own_moments = tuple(tree[name] for tree in moments)
  state = State(theta[name], before[name], own_moments, steps, around)
  with blame(rule, site, 'edit'):
    new = rule.edit(state, grads[name], step, key)
  if not isinstance(new, State):
    raise ValueError(
      f'edit of {name!r} must return a State, such as state._replace(theta=...), not '
      f'{type(new).__name__}'
    )
  checked = _like(name, 'theta', new.theta, state.theta)
  if len(new.moments) != len(moments):
    raise ValueError(f'edit of {name!r} returns {len(new.moments)} moments of {len(moments)}')
  kept = []
  for tree, old in zip(new.moments, state.moments, strict=True):
    kept.append(_like(name, 'moments', tree, old))
  together = zip(moments, kept, strict=True)
  return {**theta, name: checked}, [{**tree, name: own} for tree, own in together]


def _like(name: str, what: str, new, old):
  """A tree with the structure, the shapes and the dtypes of another."""
  found = leaf_paths(new)
  wanted = leaf_paths(old)
  for path in sorted(found.keys() ^ wanted.keys()):
    problem = 'drops' if path in wanted else 'adds'
    raise ValueError(f'edit of {name!r} {problem} {path!r} of {what}')
  for path, x in wanted.items():
    if jnp.shape(found[path]) != jnp.shape(x):
      raise ValueError(
        f'edit of {name!r} makes {path!r} of {what} {jnp.shape(found[path])}, and it is '
        f'{jnp.shape(x)}'
      )
  leaves = [jnp.asarray(found[path], x.dtype) for path, x in wanted.items()]
  return jax.tree.unflatten(jax.tree.structure(old), leaves)


@dataclasses.dataclass(frozen=True)
class Moments:
  """What an optimizer's state keeps for each trained number.

  Attributes:
    trees: in the order of the state, each with the structure of what is trained.
    rest: the state as a list, with None in place of those trees.
    structure: of that list.
    own: the structure that each tree has in the state.
    one_count: whether a count of updates stands beside trees, one for all numbers.
  """

  trees: list
  rest: list
  structure: Any
  own: list
  one_count: bool

  @classmethod
  def of(cls, optimizer, trained) -> 'Moments':
    """Takes a state apart.

    Args:
      optimizer: the state of an Optax transform.
      trained: what is trained of theta, from `Tuned.split`.

    Raises:
      ValueError: what it keeps for an entry has another shape than the entry.
    """
    paths = list(leaf_paths(trained))

    def is_like(node) -> bool:
      return bool(paths) and list(leaf_paths(node)) == paths

    shapes = {path: jnp.shape(x) for path, x in leaf_paths(trained).items()}
    nodes, structure = jax.tree_util.tree_flatten_with_path(optimizer, is_leaf=is_like)
    trees = []
    rest = []
    own = []
    beside = {keys[:-1] for keys, node in nodes if is_like(node)}
    one_count = False
    for keys, node in nodes:
      if not is_like(node):
        place = jax.tree_util.keystr(keys, simple=True, separator='/')
        _check_whole(place, paths)
        is_count = place.split('/')[-1] == 'count'
        one_count = one_count or (is_count and keys[:-1] in beside)
        rest.append(node)
        continue
      for path, x in leaf_paths(node).items():
        if not _spreads(jnp.shape(x), shapes[path]):
          raise ValueError(
            'an edit needs moments in the shape of each entry, and the optimizer keeps '
            f'{jnp.shape(x)} for {path!r}: take one that does, such as adamw or sgd'
          )
        # Integers of more bits are counts of updates.
        if x.dtype.itemsize == 1:
          raise ValueError(
            f'an edit needs moments, and the optimizer keeps codes of {x.dtype} for {path!r}: take '
            'one that keeps floats, such as adamw or sgd'
          )
      # Optax has other nodes than None in the places of what is masked.
      trees.append(jax.tree.unflatten(jax.tree.structure(trained), jax.tree.leaves(node)))
      rest.append(None)
      own.append(jax.tree.structure(node))
    return cls(trees, rest, structure, own, one_count)

  def put_back(self, trees: list):
    """The state with other trees."""
    nodes = iter(
      jax.tree.unflatten(own, jax.tree.leaves(tree))
      for own, tree in zip(self.own, trees, strict=True)
    )
    return jax.tree.unflatten(
      self.structure, [next(nodes) if node is None else node for node in self.rest]
    )


def _spreads(shape: tuple[int, ...], over: tuple[int, ...]) -> bool:
  """Whether an array spreads over a shape, one number over many: of as many axes, or of none."""
  if not shape:
    return True
  return len(shape) == len(over) and all(a in (1, b) for a, b in zip(shape, over, strict=True))


def _check_whole(place: str, paths: list[str]) -> None:
  """Raises a ValueError if an array of an optimizer's state belongs to one entry of many."""
  for path in paths:
    if place.endswith(f'/{path}'):
      raise ValueError(
        f'an edit needs moments of all entries together, and the optimizer keeps those of {path!r} '
        'with a part of them: give all of theta one update rule'
      )
