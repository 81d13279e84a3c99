"""attach(model, method, backbone, *example) -> Tuned: pure functions, resolved once, from shapes."""

import contextvars
import dataclasses
import functools
import inspect as python_inspect
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from .backends.linen import join
from .boxes import Box, Lazy, Reader, inject
from .discover import backend_of, named_arrays, sites_of
from .fused import field_of, fused
from .rules import Call, Method, Rule, Weight
from .sites import Site, Sites, natural

_TRAINS = {'train': True, 'training': True, 'is_training': True, 'deterministic': False,
           'inference': False, 'eval': False}

# (method, scratch) of the wrapped calls that are running, the outermost first.
_running: contextvars.ContextVar[tuple[tuple[str, dict], ...]] = contextvars.ContextVar('jpeft_running',
                                                                                     default=())
# {path: how many of the rules there act}, where a rule runs what it wraps as a pure function.
_beneath: contextvars.ContextVar[dict[str, int]] = contextvars.ContextVar('jpeft_beneath')


class Bound:
  """What a Call receives: the call it wraps, and what it may ask of the model around it.

  Attributes:
    site: where it is.
    module: the module in the user's model, bound.
    training: whether dropout and noise are on.
    local: scratch that lives as long as this call: the method's rules inside it write there.
    outer: the `local` of the nearest call around this one that the method wraps; None without one.
  """

  def __init__(self, run, *, name: str, site: Site, module, backend, path: str, method: str, rank: int, taps, key,
               training: bool, rank_at=None):
    self._name, self._run, self._backend, self._path, self._method, self._rank = name, run, backend, path, method, rank
    self._taps, self._key, self._rank_at = taps, key, rank_at
    self.site, self.module, self.training = site, module, training
    self.local, self.outer = {}, None

  def __call__(self, *args, **kwargs):
    return self._run(*args, **kwargs)

  def tap(self, **values: jax.Array) -> None:
    """Records arrays under this site; of a scanned layer they come stacked. In `pure` nothing is recorded."""
    if not _beneath.get({}):
      self._backend.tap(self.module, self._name, values)

  def taps(self) -> dict[str, dict[str, jax.Array]]:
    """{site path: {name: array}} recorded so far, in the order of the layers.

    A method sees what its own rules recorded; one whose rules recorded nothing sees everything.
    """
    taps = dict(sorted(self._taps().items(), key=lambda item: natural(item[0])))
    own = {path: by_rule[self._name] for path, by_rule in taps.items() if self._name in by_rule}
    return own or {path: {n: x for t in by_rule.values() for n, x in t.items()} for path, by_rule in taps.items()}

  def held(self) -> dict | None:
    """What this rule put into the model's collection 'cache' in the call before, {} at first.

    None where that collection is not mutable, or the framework has none (NNX): nothing is to be kept.
    """
    return self._backend.held(self.module, self._name)

  def hold(self, values) -> None:
    """Puts a pytree of arrays into the collection 'cache', for `held` of the call that goes on from this one."""
    self._backend.hold(self.module, self._name, values)

  def inputs(self, *args, **kwargs) -> dict[str, jax.Array]:
    """The array arguments of the call by parameter name, the first one first."""
    return named_arrays(getattr(type(self.module), self._method), args, kwargs)

  def inject(self, **fields):
    """Sets the module's own injection points (attention_fn, ...) for the length of one call."""
    return inject(self.module, **fields)

  def outside(self):
    """A context in which modules of the rule's own run; no other rule sees them."""
    return self._backend.outside()

  @property
  def key(self) -> jax.Array | None:
    """A random key for one layer and step, where training gave one."""
    return self._key if self.training else None

  def rng(self, what: str) -> jax.Array | None:
    """A random key for one layer and step in training, None in evaluation.

    Raises:
      ValueError: the model trains, and no key was given.
    """
    if not self.training:
      return None
    if self._key is None:
      raise ValueError(f'{what} at {self.site.path!r} needs a random key: call '
                       "tuned.apply(..., rngs={'dropout': key})")
    return self._key

  def pure(self):
    """(fn, arrays): the wrapped module as a pure function fn(arrays, *args, **kwargs).

    What reverses, recomputes, compresses or runs a block again is written on it. Other rules act
    inside; what the module writes (caches, statistics, taps) is dropped.
    """
    fn, arrays = self._backend.pure(self.module, self._path)
    return _under(fn, self._path, self._rank), arrays

  def layer(self, site: Site, index: int | None = 0):
    """(fn, arrays): a module elsewhere in the model, called as fn(arrays, *args, **kwargs), as in `pure`.

    Of its rules those before the method's own act inside. It is told whether the model trains by the flag
    that its call takes. The arrays hold the random keys of its dropout too: what it computes is the same each time.

    Args:
      site: where, outside of any other module's scan.
      index: of a stack, which layer; None for all: the arrays lead with the layers, and fn takes those of one.
    """
    fn, arrays, signature = self._backend.layer(self.module, site, index)
    flags = flags_of(signature, self.training)
    rank = self._rank_at(site.path)
    return _under(lambda arrays, *a, **kw: fn(arrays, *a, **{**flags, **kw}), site.path, rank), arrays

  def saving(self, pack, unpack):
    """The wrapped call, with what its backward pass keeps stored as pack(array).

    Args:
      pack: array -> pytree, for every array that the backward pass keeps and that the module does
        not hold itself.
      unpack: the inverse.

    Returns:
      A function of positional arguments, differentiable once in them and in what the module reads.
    """
    fn, arrays = self.pure()
    structure = []

    @jax.custom_vjp
    def run(arrays, args):
      return fn(arrays, *args)

    def forward(arrays, args):
      out, vjp = jax.vjp(lambda arrays, args: fn(arrays, *args), arrays, args)
      leaves, tree = jax.tree.flatten(vjp)
      held = [id(x) for x in jax.tree.leaves(arrays)]
      kept = [held.index(id(x)) if id(x) in held else None for x in leaves]
      structure[:] = [(tree, kept)]
      packed = [pack(x) for x, i in zip(leaves, kept, strict=True) if i is None]
      return out, (packed, arrays)

    def backward(residuals, cotangent):
      # Tied to the cotangent, lest XLA unpacks early or keeps the wide values after all.
      (packed, arrays), cotangent = jax.lax.optimization_barrier((residuals, cotangent))
      (tree, kept), own, wide = structure[0], jax.tree.leaves(arrays), iter(packed)
      leaves = [unpack(next(wide)) if i is None else own[i] for i in kept]
      return jax.tree.unflatten(tree, leaves)(cotangent)

    run.defvjp(forward, backward)
    return lambda *args: run(arrays, args)


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
    whole = {name: flat[join(site.path, name)] for name in site.leaves}
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
      whole = {name: flat[join(site.path, name)] for name in site.leaves}
      t = jax.tree.map(site.place, self._theta(theta, rule, site))
      flat |= {join(site.path, n): Lazy(whole, t, _Applied(rule, site), n) for n in names}
    riders = {path: self._rider(theta, path, key) for path in wrapped}
    wanted = frozenset((path, method) for path, rules in wrapped.items() for method in (
      *(getattr(rule, 'method', '__call__') for rule, _ in rules), *(['__call__'] if path in self._held else [])))
    taps = any(isinstance(rule, Call) and rule.taps for rule, _ in self.rules)
    return backend.run(self.model, backbone, flat, riders, self._hooks[training], wanted, taps, args,
                       dict(kwargs))

  def merge(self, theta, backbone):
    """Weights: a backbone that the untouched model runs as `apply` runs theta. Where the kernel was a box, what
    replaces it is plain, unless the rule gives a box too.

    Raises:
      ValueError: some rule changes the computation in a way that no weights express.
    """
    self._check_mergeable()
    backend, theta = backend_of(self.model), self._fix(theta)
    flat = dict(backend.arrays(self.model, backbone))
    for rule, site in self.rules:
      change = rule.merge if isinstance(rule, Call) else rule.apply
      arrays = {name: flat[join(site.path, name)] for name in site.leaves}
      fn = site.per_layer(lambda t, a, change=change, site=site: change(t, site, Reader(a)))
      t = self._theta(theta, rule, site)
      new = fn(t, jax.tree.map(site.lead, arrays)) if arrays else {}
      flat |= {join(site.path, n): jax.tree.map(site.place, w) if isinstance(w, Box)
               else site.place(w).astype(arrays[n].dtype) for n, w in new.items()}
    return backend.replace(self.model, backbone, flat)

  @property
  def mergeable(self) -> bool:
    """Whether `merge` can be called."""
    return not self.unmergeable

  @property
  def unmergeable(self) -> list[tuple[Rule, Site]]:
    return [(r, s) for r, s in self.rules if isinstance(r, Call) and r.merge is None]

  def _check_mergeable(self) -> None:
    for rule, site in self.unmergeable:
      raise ValueError(f'{rule.name} at {site.path!r} changes the computation, not the weights: it '
                       'cannot be merged')

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
    return dataclasses.replace(self, rules=rules, method=Method(
      pair for pair in self.method if pair[1].name in names))

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
    """{path: kernel} of the sites whose kernel is a box in the backbone, and can be computed again where it is used."""
    backend = backend_of(self.model)
    flat = backend.arrays(self.model, self.backbone)
    return {path: site.matrices[0] for path, site in self.sites.items()
            if field_of(site) and isinstance(flat[join(path, site.matrices[0])], Box)}

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
    box = backend.stored(module, self._held[path]) if path in self._held and method == '__call__' else None
    if weights or box is not None:
      random = [rule.name for rule, _ in weights if rule.needs_dot]
      if training and key is None and random:
        raise ValueError(f'{random[0]} dropout at {path!r} needs a random key: call '
                         "tuned.apply(..., rngs={'dropout': key})")
      call = fused(weights, self.sites[path], module, call, key if training else None, box)
    for rank, (rule, site) in enumerate(here):
      if isinstance(rule, Call):
        sub = None if key is None else jax.random.fold_in(key, zlib.crc32(rule.name.encode()))
        bound = Bound(call, name=rule.name, site=site, module=module, backend=backend, path=path,
                      method=method, rank=rank, taps=taps, key=sub, training=training,
                      rank_at=functools.partial(self._rank_at, rule.name))
        call = functools.partial(_called, rule, theta.get(rule.name, {}), bound)
    return call

  def _rank_at(self, name: str, path: str) -> int:
    """How many of the rules that wrap the call at a path come before those of one name."""
    there = [r.name for r, _ in self._plan[1].get(path, ()) if getattr(r, 'method', '__call__') == '__call__']
    return there.index(name) if name in there else len(there)

  def _slim(self, t, name: str, path: str):
    """One layer's theta, without the axes of one that placing it added."""
    site = self.sites[path]
    if not site.axes or not t:
      return t
    return jax.tree.map(lambda x, s: x.reshape(s.shape[len(site.axes):]), t, self.shapes[name][path])

  def _theta(self, theta, rule: Rule, site: Site):
    """One rule's entry of theta; a clear error where theta is of another method."""
    try:
      return theta[rule.name][site.path]
    except KeyError:
      if site.path in self.shapes.get(rule.name, {}):
        held = ', '.join(theta) or 'nothing'
        raise ValueError(f'theta has no entry {rule.name!r} for {site.path!r} (it holds {held}): was it '
                         'made by another method?') from None
      return {}

  def _rider(self, theta, path: str, key):
    """What rides into the modules of one path: theta, a random key, and a mark of this Tuned, so
    that a jitted layer cached for another method is traced again."""
    site, rules = self.sites[path], self._plan[1][path]
    rider = {'theta': {rule.name: self._theta(theta, rule, site) for rule, site in rules},
             f'id{id(self)}': jnp.zeros(site.lengths)}
    if key is not None:
      sub = jax.random.fold_in(key, zlib.crc32(site.path.encode()))
      keys = jax.random.split(sub, site.lengths) if site.axes else sub
      rider['key'] = jax.random.key_data(keys)
    return jax.tree.map(site.place, rider)

  def _fix(self, theta):
    if not any(rule.fixed for rule, _ in self.rules):
      return theta
    return jax.tree.map(lambda x, train: x if train else jax.lax.stop_gradient(x), theta,
                        self.trainable(theta))


class Arrays(Reader):
  """The arrays of a site, for `init`: a mapping by name, and `model`, all arrays of the backbone."""

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


def attach(model, method: Method, backbone, /, *args, **kwargs) -> Tuned:
  """Resolves `method` against `model`.

  Args:
    model: a Linen or an NNX module; it is read, never changed.
    method: such as `lora(8)` or `chain(lora(8), tune('{head}'))`.
    backbone: what the model holds: Linen's variables, or `nnx.state(model)`; shapes will do.
    *args: an example input; shapes (jax.ShapeDtypeStruct) will do.
    **kwargs: keyword arguments of the forward pass.

  Raises:
    ValueError: a pattern matches no site, or no site that its rule can adapt; two rules of one
      name meet at a site.
  """
  sites = sites_of(model, backbone, *args, **kwargs)
  rules = [(rule, site) for pattern, rule in method for site in _match(pattern, rule, sites)]
  rules.sort(key=lambda pair: isinstance(pair[0], Call))  # arrays come before the call that reads them
  seen = set()
  for rule, site in rules:
    what = (rule.name, site.path, getattr(rule, 'method', '__call__'))
    if what in seen:
      raise ValueError(f'two rules called {rule.name!r} meet at {site.path!r}; give one of the methods '
                       'another name=')
    seen.add(what)
  tuned = Tuned(model, tuple(rules), sites, Method(method), jax.eval_shape(lambda: backbone))
  for rule, site, _ in tuned._plan[0]:
    if (rule.needs_dot or rule.needs_input) and (rule, site) not in tuned._plan[1].get(site.path, ()):
      what, way_out = ('dropout acts', '; use dropout=0') if rule.needs_dot else ('the rule acts', '')
      raise ValueError(f'{rule.name} at {site.path!r}: {what} on the input of a layer, and '
                       f'{site.kind or "this module"} offers no injection point for it{way_out}')
  jax.tree.leaves(tuned.shapes)  # what a rule's `init` refuses is said here, not at the first step
  return tuned


def _match(pattern: str, rule: Rule, sites: Sites) -> list[Site]:
  """The sites a rule acts on; says what was near when there are none."""
  hits = sites.find(pattern)
  good = [s for s in hits if (rule.method in s.methods if isinstance(rule, Call) else _changes(rule, s))]
  if not good:
    why = f'{len(hits)} sites match, but none has what it adapts' if hits else 'no site matches'
    raise ValueError(f'{rule.name}: {why}: {pattern!r}. Near it, of {len(sites)} sites: '
                     f'{", ".join(sites.nearest(pattern))}')
  return good


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


def flags_of(fn, training: bool) -> dict[str, bool]:
  """What a module's call is told about training: {'deterministic': False}, say, by the parameters it has."""
  parameters = python_inspect.signature(fn).parameters
  return {name: training == trains for name, trains in _TRAINS.items() if name in parameters}


def _under(fn, path: str, rank: int):
  """fn(arrays, ...) with as many of the rules at a path as `rank` says, and nothing recorded."""
  def run(arrays, *args, **kwargs):
    token = _beneath.set({**_beneath.get({}), path: rank})
    try:
      return fn(arrays, *args, **kwargs)
    finally:
      _beneath.reset(token)
  return run


def _frozen(x):
  return jax.lax.stop_gradient(x) if hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.inexact) else x


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
  floats = [x.dtype for x in jax.tree.leaves((args, kwargs))
            if hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.floating)]
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
    leaves = [x.astype(d) if d is not None and hasattr(x, 'astype') and x.dtype != d else x
              for x, d in zip(leaves, dtypes[-1], strict=True)]
  return jax.tree.unflatten(tree, leaves)


def _cast(tree, dtype):
  return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _mode(model, args, kwargs) -> tuple[bool, jax.Array | None]:
  """(whether dropout is on, the key for it): the model's own flag decides, else whether a key came."""
  rngs = kwargs.get('rngs')
  key = rngs.get('dropout') if isinstance(rngs, dict) else None
  flag = _flag(model, args, {k: v for k, v in kwargs.items() if k not in ('rngs', 'mutable')})
  training = key is not None if flag is None else flag
  return training, key if training else None


def _flag(model, args, kwargs) -> bool | None:
  """What the call, or else the model, says about training; None when neither says anything."""
  method = kwargs.pop('method', None) or '__call__'
  fn = getattr(type(model), method) if isinstance(method, str) else method
  try:
    given = python_inspect.signature(fn).bind(model, *args, **kwargs)
  except (TypeError, ValueError):
    return None
  given.apply_defaults()
  values = {**given.arguments, **given.arguments.get('kwargs', {})}
  for name, trains in _TRAINS.items():
    if isinstance(values.get(name), bool):
      return values[name] == trains
  flags = {m.deterministic for m in _modules(model) if isinstance(getattr(m, 'deterministic', None), bool)}
  return None if not flags else not all(flags)


def _modules(model):
  """The root of a Linen model; all modules of an NNX model, whose train() and eval() set them all."""
  backend = backend_of(model)
  return [model] if not hasattr(backend, 'modules') else backend.modules(model)


__all__ = ['Arrays', 'Bound', 'Box', 'Tuned', 'attach']
