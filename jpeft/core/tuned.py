"""A method resolved against a model: pure functions over two trees, theta and the backbone."""

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from .backends.choice import backend_of
from .boxes import Box, Lazy, Reader
from .context import Bound, _beneath, _running
from .fused import field_of, fused
from .mode import _mode
from .paths import join_path
from .rules import Call, Method, Rule, Weight
from .sites import Site, Sites


@dataclasses.dataclass(frozen=True, eq=False)
class Tuned:
  """A method resolved against a model: pure functions over two trees, theta and the backbone.

  Attributes:
    model: the user's module, untouched.
    rules: (rule, site), in the order in which they act.
    sites: all sites of the model.
    method: as given to `attach`.
    backbone: the shapes of what the model holds.
  """

  model: Any
  rules: tuple[tuple[Rule, Site], ...]
  sites: Sites
  method: Method
  backbone: Any

  @functools.cached_property
  def shapes(self):
    """theta as shapes; nothing is computed."""
    return jax.eval_shape(self.init, jax.random.key(0), self.backbone)

  def init(self, key: jax.Array, backbone) -> dict:
    """theta = {method name: {site path: arrays}}; arrays of stacked layers lead with the stack."""
    backend, theta = backend_of(self.model), {}
    flat = backend.arrays(self.model, backbone)
    for rule, site in self.rules:
      t = self._init_rule(rule, site, _key(key, rule, site), flat)
      # A weak type would turn strong at the first update, and compile the training step again.
      t = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), t)
      if jax.tree.leaves(t):
        theta.setdefault(rule.name, {}).setdefault(site.path, {}).update(t)
    return theta

  def _init_rule(self, rule: Rule, site: Site, key, flat):
    whole = {name: flat[join_path(site.path, name)] for name in site.leaves}
    if not site.axes:
      return rule.init(key, site, Arrays(whole, flat))
    arrays = {name: jax.tree.map(site.lead, x) for name, x in whole.items()}
    keys = jax.random.split(key, site.lengths)
    return site.per_layer(lambda k, a: rule.init(k, site, Arrays(a, flat)))(keys, arrays)

  def apply(self, theta, backbone, *args, **kwargs):
    """The model's output under the method; differentiable in theta alone.

    Args:
      theta: from `init`.
      backbone: as given to `attach`; under stop_gradient.
      *args, **kwargs: of the model's call. For Linen `rngs`, `mutable` and `method` are those of
        `Module.apply`; for NNX `rngs={'dropout': key}` seeds the model's streams, `mutable=True` or
        a filter also returns the Variables that the call wrote, `method` names the method.

    Returns:
      The output, or (output, state) with `mutable`.
    """
    backend = backend_of(self.model)
    backbone = jax.tree.map(_frozen, backbone)
    theta = self._fix(theta)
    flat = dict(backend.arrays(self.model, backbone))
    taken = {name for rule, _ in self.rules for name in getattr(rule, 'takes', ())}
    training, key = _mode(self.model, args, {n: x for n, x in kwargs.items() if n not in taken})
    boxed, wrapped = self._plan
    for rule, site, names in boxed:
      whole = {name: flat[join_path(site.path, name)] for name in site.leaves}
      t = jax.tree.map(site.place, self._theta(theta, rule, site))
      flat |= {join_path(site.path, n): Lazy(whole, t, _Applied(rule, site), n) for n in names}
    riders = {path: self._rider(theta, path, key) for path in wrapped}
    wanted = frozenset(
      (path, method)
      for path, rules in wrapped.items()
      for method in (
        *(getattr(rule, 'method', '__call__') for rule, _ in rules),
        *(['__call__'] if path in self._held else []),
      )
    )
    taps = any(isinstance(rule, Call) and rule.taps for rule, _ in self.rules)
    return backend.run(
      self.model, backbone, flat, riders, self._hooks[training], wanted, taps, args, dict(kwargs)
    )

  def merge(self, theta, backbone):
    """Weights: a backbone that the untouched model runs as `apply` runs theta. Where the kernel was
    a box, what replaces it is plain, unless the rule gives a box too.

    Raises:
      ValueError: some rule changes the computation in a way that no weights express.
    """
    self._check_mergeable()
    backend, theta = backend_of(self.model), self._fix(theta)
    flat = dict(backend.arrays(self.model, backbone))
    for rule, site in self.rules:
      change = rule.merge if isinstance(rule, Call) else rule.apply
      arrays = {name: flat[join_path(site.path, name)] for name in site.leaves}
      fn = site.per_layer(lambda t, a, change=change, site=site: change(t, site, Reader(a)))
      t = self._theta(theta, rule, site)
      new = fn(t, jax.tree.map(site.lead, arrays)) if arrays else {}
      flat |= {
        join_path(site.path, n): jax.tree.map(site.place, w)
        if isinstance(w, Box)
        else site.place(w).astype(arrays[n].dtype)
        for n, w in new.items()
      }
    return backend.replace(self.model, backbone, flat)

  @property
  def mergeable(self) -> bool:
    """Whether `merge` can be called."""
    return not self.unmergeable

  @property
  def unmergeable(self) -> list[tuple[Rule, Site]]:
    return [(r, s) for r, s in self.rules if not r.mergeable]

  def _check_mergeable(self) -> None:
    for rule, site in self.unmergeable:
      raise ValueError(
        f'{rule.name} at {site.path!r} changes the computation, not the weights: it '
        'cannot be merged'
      )

  @property
  def updates(self) -> bool:
    """Whether `update` does anything."""
    return any(rule.update for rule, _ in self.rules)

  def update(self, theta, step, key):
    """theta after the schedules and periodic edits that the method's rules make.

    Args:
      theta: after the optimizer's update.
      step: how many updates were made, a scalar (it may be traced).
      key: a random key.
    """
    theta = {name: dict(sites) for name, sites in theta.items()}
    for rule, site in self.rules:
      if rule.update and site.path in theta.get(rule.name, {}):
        fn = lambda t, k, rule=rule, site=site: rule.update(t, site, step, k)
        sub = _key(key, rule, site)
        keys = jax.random.split(sub, site.lengths) if site.axes else sub
        theta[rule.name][site.path] = site.per_layer(fn)(theta[rule.name][site.path], keys)
    return theta

  def trainable(self, theta) -> Any:
    """A tree of bools: False for the entries that a rule holds fixed."""
    fixed = {}
    for rule, site in self.rules:
      fixed.setdefault((rule.name, site.path), set()).update(rule.fixed)

    def leaf(path, _):
      names = [getattr(k, 'key', None) for k in path]
      return not fixed.get((names[0], names[1]), set()) & set(names[2:])

    return jax.tree_util.tree_map_with_path(leaf, theta)

  def only(self, *names: str) -> 'Tuned':
    """The same model with some of its adapters; they read the same theta.

    Raises:
      ValueError: no rule has such a name.
    """
    known = self.method.names
    for name in names:
      if name not in known:
        raise ValueError(f'no adapter is called {name!r}; there are {", ".join(known)}')
    rules = tuple((r, s) for r, s in self.rules if r.name in names)
    return dataclasses.replace(
      self, rules=rules, method=Method(pair for pair in self.method if pair[1].name in names)
    )

  # What follows is resolved once and read at every trace.

  @functools.cached_property
  def _plan(self) -> tuple[list, dict]:
    """([(rule, site, names of the arrays that it boxes)], {path: rules that wrap calls}).

    A Weight is fused when every Weight after it that changes the kernel is: merge equals apply in
    any order. What a fused one changes beside the kernel, such as a bias, is boxed all the same.
    """
    boxed, wrapped, kernels = [], {}, set()
    for rule, site in reversed(self.rules):
      names = () if isinstance(rule, Call) else _changes(rule, site)
      if isinstance(rule, Call) or _fusible(rule, site) and site.path not in kernels:
        wrapped.setdefault(site.path, []).insert(0, (rule, site))
        names = tuple(n for n in names if n not in site.matrices)
      elif set(names) & set(site.matrices):
        kernels.add(site.path)
      if names:
        boxed.insert(0, (rule, site, names))
    wrapped |= {path: [] for path in self._held if path not in wrapped}
    return boxed, wrapped

  @functools.cached_property
  def _held(self) -> dict[str, str]:
    """{path: kernel} of the sites whose kernel is a box in the backbone, and can be computed again
    where it is used.
    """
    backend = backend_of(self.model)
    flat = backend.arrays(self.model, self.backbone)
    return {
      path: site.matrices[0]
      for path, site in self.sites.items()
      if field_of(site) and isinstance(flat[join_path(path, site.matrices[0])], Box)
    }

  @functools.cached_property
  def _hooks(self) -> dict:
    return {training: functools.partial(self._hook, training) for training in (True, False)}

  def _hook(self, training, path, method, module, call, rider, taps):
    """Wraps one call of one module; holds no arrays, so that traces may be cached by it."""
    backend, key = backend_of(self.model), rider.get('key')
    if key is not None:
      key = jax.random.wrap_key_data(key)
    here = [(r, s) for r, s in self._plan[1][path] if getattr(r, 'method', '__call__') == method]
    here = here[: _beneath.get({}).get(path, len(here))]
    theta = {name: self._slim(t, name, path) for name, t in rider['theta'].items()}
    weights = [(r, theta.get(r.name, {})) for r, _ in here if isinstance(r, Weight)]
    box = (
      backend.stored(module, self._held[path])
      if path in self._held and method == '__call__'
      else None
    )
    if weights or box is not None:
      random = [rule.name for rule, _ in weights if rule.requires == 'input in training']
      if training and key is None and random:
        raise ValueError(
          f'{random[0]} dropout at {path!r} needs a random key: call '
          "tuned.apply(..., rngs={'dropout': key})"
        )
      call = fused(weights, self.sites[path], module, call, key if training else None, box)
    for rank, (rule, site) in enumerate(here):
      if isinstance(rule, Call):
        sub = None if key is None else jax.random.fold_in(key, zlib.crc32(rule.name.encode()))
        bound = Bound(
          call,
          name=rule.name,
          site=site,
          module=module,
          backend=backend,
          path=path,
          method=method,
          rank=rank,
          taps=taps,
          key=sub,
          training=training,
          rank_at=functools.partial(self._rank_at, rule.name),
        )
        call = functools.partial(_called, rule, theta.get(rule.name, {}), bound)
    return call

  def _rank_at(self, name: str, path: str) -> int:
    """How many of the rules that wrap the call at a path come before those of one name."""
    there = [
      r.name
      for r, _ in self._plan[1].get(path, ())
      if getattr(r, 'method', '__call__') == '__call__'
    ]
    return there.index(name) if name in there else len(there)

  def _slim(self, t, name: str, path: str):
    """One layer's theta, without the axes of one that placing it added."""
    site = self.sites[path]
    if not site.axes or not t:
      return t
    return jax.tree.map(
      lambda x, s: x.reshape(s.shape[len(site.axes) :]), t, self.shapes[name][path]
    )

  def _theta(self, theta, rule: Rule, site: Site):
    """One rule's entry of theta; a clear error where theta is of another method."""
    try:
      return theta[rule.name][site.path]
    except KeyError:
      if site.path in self.shapes.get(rule.name, {}):
        held = ', '.join(theta) or 'nothing'
        raise ValueError(
          f'theta has no entry {rule.name!r} for {site.path!r} (it holds {held}): was it '
          'made by another method?'
        ) from None
      return {}

  def _rider(self, theta, path: str, key):
    """What rides into the modules of one path: theta, a random key, and a mark of this Tuned, so
    that a jitted layer cached for another method is traced again."""
    site, rules = self.sites[path], self._plan[1][path]
    rider = {
      'theta': {rule.name: self._theta(theta, rule, site) for rule, site in rules},
      f'id{id(self)}': jnp.zeros(site.lengths),
    }
    if key is not None:
      sub = jax.random.fold_in(key, zlib.crc32(site.path.encode()))
      keys = jax.random.split(sub, site.lengths) if site.axes else sub
      rider['key'] = jax.random.key_data(keys)
    return jax.tree.map(site.place, rider)

  def _fix(self, theta):
    if not any(rule.fixed for rule, _ in self.rules):
      return theta
    return jax.tree.map(
      lambda x, train: x if train else jax.lax.stop_gradient(x), theta, self.trainable(theta)
    )


class Arrays(Reader):
  """The arrays of a site, for `init`: a mapping by name, and `model`, all arrays of the
  backbone.
  """

  def __init__(self, arrays, flat):
    super().__init__(arrays)
    self.model = Reader(flat)


@dataclasses.dataclass(frozen=True, eq=False)
class _Applied:
  """(theta, arrays) -> new arrays, for a box."""

  rule: Weight
  site: Site

  def __call__(self, theta, arrays):
    return self.rule.apply(theta, self.site, arrays)


def _shapes(site: Site) -> dict[str, Any]:
  plain = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in site.leaves.items()}
  return {**plain, **site.boxes}


@functools.lru_cache(maxsize=65536)
def _changes(rule: Weight, site: Site) -> tuple[str, ...]:
  """The names of the arrays that a Weight replaces at a site, from shapes."""

  def new(key, arrays):
    return rule.apply(rule.init(key, site, Arrays(arrays, {})), site, Reader(arrays))

  return tuple(jax.eval_shape(new, jax.random.key(0), _shapes(site)))


def _fusible(rule: Weight, site: Site) -> bool:
  if rule.dot is None or field_of(site) is None:
    return False
  return set(site.matrices) <= set(_changes(rule, site))


def _frozen(x):
  return (
    jax.lax.stop_gradient(x) if hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.inexact) else x
  )


def _key(key, rule: Rule, site: Site):
  """A key for a rule at a site that no other rule or site changes."""
  return jax.random.fold_in(key, zlib.crc32(f'{rule.name} {site.path}'.encode()))


def _called(rule: Call, theta, bound: Bound, *args, **kwargs):
  """Runs a Call in the dtype of its input, and gives back the dtype that the layer gives."""
  dtypes = []

  def call(*a, **kw):
    out = bound_run(*a, **kw)
    dtypes.append([getattr(x, 'dtype', None) for x in jax.tree.leaves(out)])
    return out

  bound_run, bound._run = bound._run, call
  floats = [
    x.dtype
    for x in jax.tree.leaves((args, kwargs))
    if hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.floating)
  ]
  dtype = floats[0] if floats else bound.site.out.dtype
  around = _running.get()
  bound.outer = next((local for name, local in reversed(around) if name == rule.name), None)
  token = _running.set((*around, (rule.name, bound.local)))
  try:
    out = rule.apply(_cast(theta, dtype), bound, *args, **kwargs)
  finally:
    _running.reset(token)
  leaves, tree = jax.tree.flatten(out)
  if dtypes and len(dtypes[-1]) == len(leaves):
    leaves = [
      x.astype(d) if d is not None and hasattr(x, 'astype') and x.dtype != d else x
      for x, d in zip(leaves, dtypes[-1], strict=True)
    ]
  return jax.tree.unflatten(tree, leaves)


def _cast(tree, dtype):
  return jax.tree.map(
    lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
  )
