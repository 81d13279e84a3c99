"""Models without the heads and hidden units that a method multiplies by zero."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Found, Method, Moved, MovedLayer, Site, Tuned, attach, resolved, whole_of

from .backbone import cut_by
from .keep import Keep
from .plan import Plan, family_of, layers_of_blocks, plan_of, plays
from .theta import widened_theta


class Pruned(NamedTuple):
  """A model without what a method leaves out.

  Attributes:
    model, backbone: narrow.
    method: to attach to it.
    keep: what it keeps of the wide model.
  """

  model: Any
  backbone: Any
  method: Method
  keep: Keep


def prunes(method: Method) -> bool:
  """Whether a method has found parts of the model to leave out, see `Preparation.moved`."""
  done = (rule.preparation for _, rule in method if rule.preparation is not None)
  return any(preparation.moved is not None and preparation.found for preparation in done)


def pruned(method: Method, model, backbone, *args, **kwargs) -> Pruned:
  """The model without the heads and hidden units that a prepared method leaves out.

  Args:
    method: such as `light_peft`, from `jpeft.prepare`.
    model, backbone, *args, **kwargs: as for `attach`; of a model that `narrowed` takes.

  Raises:
    TypeError, ValueError: as `narrowed`; or the method leaves nothing out, or waits for its pass.

  Example:
    >>> method = jpeft.prepare(jpeft.light_peft(), model, variables, batches)  # doctest: +SKIP
    >>> small = jpeft.pruned(method, model, variables, *example)  # doctest: +SKIP
    >>> tuned = jpeft.attach(small.model, small.method, small.backbone, *example)  # doctest: +SKIP
  """
  if not prunes(method):
    raise ValueError(f'{", ".join(method.names)}: no rule of it prunes the model before training')
  tuned = attach(model, method, backbone, *args, **kwargs)

  def masks(key, backbone):
    return _masks(tuned, tuned.init(key, backbone))

  are_shapes = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(backbone))
  arrays = backbone
  if are_shapes:
    # What stays follows from the method alone: of these zeros, which take no memory, none is read.
    arrays = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), backbone)
  keep = _kept(tuned, jax.jit(masks)(jax.random.key(0), arrays))
  plan = plan_of(model, keep)
  if are_shapes:
    weights = jax.eval_shape(lambda backbone: cut_by(plan, model, backbone)[1], backbone)
  else:
    _, weights = cut_by(plan, model, backbone)
  return Pruned(plan.model, weights, _moved(method, plan), keep)


def recovered(small: Pruned, model, backbone, theta: Any, *args, **kwargs) -> tuple[Tuned, Any]:
  """A method that was trained on a narrow model, and its theta, on the model it was cut from.

  Args:
    small: from `pruned`, of a method such as `loram` that is used on the whole model.
    model, backbone, *args, **kwargs: that one, as for `attach`; kernels may be in 4 bits.
    theta: of `small.method` on the narrow model.

  Returns:
    (the method attached to `model`, its theta): `theta` with zeros in the places that were cut.

  Raises:
    ValueError: the method prunes for good; or as `widened_theta`.

  Example:
    >>> tuned, theta = jpeft.recovered(small, model, variables, theta, *example)  # doctest: +SKIP
  """
  if not recovers(small.method):
    raise ValueError(
      f'{", ".join(small.method.names)}: what it leaves out stays so; only a method such as loram '
      'is used on the whole model'
    )
  tuned = attach(model, whole_of(small.method), backbone, *args, **kwargs)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tuned.shapes)
  return tuned, widened_theta(model, small.keep, theta, zeros)


def recovers(method: Method) -> bool:
  """Whether a method is trained on a narrow model and used on the whole one."""
  return any(rule.preparation is not None and rule.preparation.whole for _, rule in method)


def _moved(method: Method, plan: Plan) -> Method:
  """The method with what it found, in the places of the narrow model."""
  modules = {}
  for path, sources in plan.sources.items():
    layers = tuple(MovedLayer(s.site.path, s.layer, s.ins, s.outs) for s in sources)
    modules[path] = Moved(bool(plan.narrow[path].axes), layers)
  made = method
  done = {rule.preparation for _, rule in method if rule.preparation is not None}
  for preparation in done:
    if preparation.moved is None:
      continue
    found: Found = preparation.moved(preparation.found or {}, modules)
    made = resolved(made, preparation, found)
  return made


def keep_of(tuned: Tuned, theta: Any) -> Keep:
  """What a narrow model keeps that computes what a theta does: all parts but those it has at zero.

  Args:
    tuned: a method that prunes, such as `loraprune` or `light_peft`, attached to a model that
      `narrowed` takes.
    theta: of it, on the host.

  Raises:
    TypeError: another model.
    ValueError: a layer whose parts are neither heads nor hidden units.
  """
  return _kept(tuned, _masks(tuned, theta))


# {name of a rule: {path: {array: what says which parts stay}}}.
_Masks = Mapping[str, Mapping[str, Mapping[str, Any]]]


def _masks(tuned: Tuned, theta: Any) -> _Masks:
  """What a theta says of the parts that stay."""
  read = tuned.expand(theta)
  found: dict[str, dict[str, dict[str, Any]]] = {}
  for rule, site in tuned.rules:
    entry = getattr(rule, 'cuts', '')
    for array, t in read.get(rule.name, {}).get(site.path, {}).items():
      if entry and entry in t:
        found.setdefault(rule.name, {}).setdefault(site.path, {})[array] = t[entry]
  return found


def _kept(tuned: Tuned, masks: _Masks) -> Keep:
  """`keep_of`, by what a theta says of the parts that stay."""
  family = family_of(tuned.model)
  blocks = {}
  for (stack, number), (path, index) in layers_of_blocks(family, tuned.sites).items():
    blocks[path, index] = stack, number
  stacks = {stack: _Cuts() for stack, _ in blocks.values()}
  for rule, site in tuned.rules:
    for kept in masks.get(rule.name, {}).get(site.path, {}).values():
      cut = _field(family, site)
      block = max((p for p, _ in blocks if site.path.startswith(f'{p}/')), key=len)
      kept = np.asarray(kept)
      positions = range(site.layers) if site.chosen is None else site.chosen
      layers = kept.reshape(math.prod(site.theta_lengths), -1)
      for position, parts in zip(positions, layers, strict=True):
        stack, number = blocks[block, position]
        if not parts.all():
          getattr(stacks[stack], cut)[number] = np.flatnonzero(parts)
  first, *others = (Keep(**dataclasses.asdict(cuts)) for cuts in stacks.values())
  return dataclasses.replace(first, decoder=others[0]) if others else first


@dataclasses.dataclass
class _Cuts:
  """What stays of the blocks of a stack, see `Keep`."""

  heads: dict = dataclasses.field(default_factory=dict)
  mlp: dict = dataclasses.field(default_factory=dict)
  cross_heads: dict = dataclasses.field(default_factory=dict)


def cuts_anything(keep: Keep) -> bool:
  """Whether a narrow model would be smaller."""
  own: Mapping[str, Any] = vars(keep)
  return any(own[field] for field in ('heads', 'mlp', 'cross_heads')) or (
    keep.decoder is not None and cuts_anything(keep.decoder)
  )


def _field(family, site: Site) -> str:
  """The field of `Keep` that the parts of a layer's inputs belong to."""
  if plays(family, 'fc2', site.path):
    return 'mlp'
  if plays(family, 'o', site.path):
    return 'cross_heads' if '/cross_attention/' in f'/{site.path}' else 'heads'
  raise ValueError(
    f'{site.path!r} is neither the layer behind attention nor the end of an MLP: its inputs are '
    'not cut off a model'
  )
