"""What a Call can use of the model around it."""

import contextvars
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .attention import refusal, wrapped, wrapped_too, wraps
from .beside import Beside, beside, given_by_position
from .blame import blame
from .discover import named, named_arrays
from .entries import cast, names_entry
from .example import spec_of, taken_apart
from .injection import PRODUCTS, inject
from .keys import named_key
from .mode import flags_of
from .paths import AUX, TAPPED, WRITTEN, leaf_paths, natural
from .rules import Call, Weight
from .sites import Site
from .trace import Use, uses

# (method, its `local`) of the wrapped calls that are running, the outermost first.
_running: contextvars.ContextVar[tuple[tuple[str, dict], ...]] = contextvars.ContextVar(
  'jpeft_running', default=()
)
# {path: how many of the rules there act}, while a rule runs a module as a pure function.
_limits: contextvars.ContextVar[dict[str, int]] = contextvars.ContextVar('jpeft_limits')
# Whether what is recorded in such a module is dropped, or an error.
_drops: contextvars.ContextVar[bool] = contextvars.ContextVar('jpeft_drops', default=True)


class Recording(NamedTuple):
  """What rules may record in one call of the model.

  Attributes:
    on: whether anything can be recorded. In Linen it costs a scan an output a layer, so that it is
      off until a rule records.
    aux: whether the caller asked for what stands beside the output.
  """

  on: bool
  aux: bool


class NeedsRecording(Exception):
  """A rule records in a call that was traced without recording: it is traced again."""


class Bound:
  """What a Call receives: the call that it wraps, and what it can use of the model around it.

  Attributes:
    site: where it is.
    module: the module in the user's model, bound.
    training: whether dropout and noise are on.
    number: of the layer, from 0 on; None outside of layers. In a stack it is traced.
    local: a dict that lives as long as this call; the method's rules inside of it can read it.
    outer: the `local` of the nearest call around this one that the method wraps; None without one.
    root: the `local` of the outermost such call, whatever lies between; None without one.
  """

  def __init__(
    self,
    run: Callable,
    *,
    rule: Call,
    site: Site,
    module,
    backend,
    position: int,
    position_at: Callable[[str], int],
    number: Any,
    taps: Callable[[], dict],
    recording: 'Recording',
    theta: Any,
    key: jax.Array | None,
    training: bool,
  ):
    """Made by Tuned.

    Args:
      run: the call that is wrapped.
      rule: which wraps it.
      site: where.
      module: bound.
      backend: of the model.
      position: how many rules at the site act before this one.
      position_at: path -> how many rules there act before those of this method.
      number: of the layer.
      taps: () -> what was recorded so far.
      recording: what may be recorded in this call of the model.
      theta: of the rule at this layer, as stored.
      key: for one layer and step, None without one.
      training: whether the model trains.
    """
    self.site = site
    self.module = module
    self.training = training
    self.number = number
    self.local: dict[str, Any] = {}
    self.outer: dict[str, Any] | None = None
    self.root: dict[str, Any] | None = None
    self._run = run
    self._active: jax.Array | None = None  # in a stack: whether the rule acts in this layer
    self._rule = rule
    self._backend = backend
    self._position = position
    self._position_at = position_at
    self._taps = taps
    self._recording = recording
    self._theta = theta
    self._key = key
    self._purpose: str | None = None  # what the key itself was first asked for

  def __call__(self, *args, **kwargs):
    return self._run(*args, **kwargs)

  def tap(self, **values: jax.Array) -> None:
    """Records arrays under this site; those of a scanned layer come out stacked.

    In `pure` and `layer` nothing is recorded.
    """
    self._record(TAPPED, values)

  def aux(self, **values: jax.Array) -> None:
    """Gives arrays beside the output: `tuned.apply(..., aux=True)` returns them.

    Arrays of one name from several layers are stacked. In `pure` and `layer`, and where the caller
    did not ask for them, they are dropped.
    """
    if self._recording.aux:
      self._record(AUX, values)

  def write(self, **entries) -> None:
    """New values for entries of this rule's theta, such as running means.

    `tuned.apply(..., aux=True)` returns them, and `tuned.write_back` puts them into theta; without
    `aux=True`, as in evaluation, they are dropped.

    Raises:
      ValueError: theta has no such entry, or one that is trained, or of another shape.
    """
    for name, value in entries.items():
      self._check_written(name, value)
    if self._recording.aux:
      cast_back = {}
      for name, value in entries.items():
        like = self._theta[name]
        cast_back[name] = jax.tree.map(lambda x, old: jnp.asarray(x).astype(old.dtype), value, like)
      self._record(WRITTEN, jax.lax.stop_gradient(cast_back))

  def _check_written(self, name: str, value) -> None:
    where = f'{self._rule.name} at {self.site.path!r} writes {name!r}'
    if self._rule.generator is not None:
      raise ValueError(f'{where}, which is made of a smaller tree at each call: it would be lost')
    if name not in self._theta:
      raise ValueError(f'{where}, and its theta has {", ".join(self._theta) or "no entries"}')
    old = self._theta[name]
    for path, x in leaf_paths({name: old}).items():
      keys = path.split('/')
      is_held = any(names_entry(fixed, keys) for fixed in self._rule.fixed)
      if jnp.issubdtype(x.dtype, jnp.inexact) and not is_held:
        raise ValueError(f'{where}, which is trained: name it in fixed=')
    if jax.tree.map(jnp.shape, value) != jax.tree.map(jnp.shape, old):
      raise ValueError(
        f'{where} of shape {jax.tree.map(jnp.shape, value)}, and theta has '
        f'{jax.tree.map(jnp.shape, old)} there'
      )

  def _record(self, kind: str, values) -> None:
    if _limits.get({}):
      if not _drops.get():
        raise ValueError(
          f'{self._rule.name} at {self.site.path!r} records arrays where a rule around it runs the '
          'module on one part of its input after the other: they would be lost'
        )
      return
    if not self._recording.on:
      raise NeedsRecording
    self._backend.record(self.module, kind, self._rule.name, values)

  def taps(self) -> dict[str, dict[str, jax.Array]]:
    """{site path: {name: array}} that rules of this method's name recorded so far.

    They come in the order of the layers.

    Raises:
      ValueError: none of them has recorded anything yet.
    """
    if not self._recording.on:
      raise NeedsRecording
    found = {}
    others = {}
    for path, kinds in sorted(self._taps().items(), key=lambda item: natural(item[0])):
      by_rule = kinds.get(TAPPED, {})
      others |= dict.fromkeys(by_rule)
      if self._rule.name in by_rule:
        found[path] = by_rule[self._rule.name]
    if not found:
      raise ValueError(
        f'{self._rule.name} at {self.site.path!r} reads taps, and no rule of that name has '
        f'recorded any before; rules that have: {", ".join(others) or "none"}'
      )
    return found

  @property
  def has_cache(self) -> bool:
    """Whether the module holds a cache of earlier tokens, which this call goes on with."""
    return self._backend.has_cache(self.module)

  def read_cache(self) -> dict | None:
    """What this rule wrote into the model's collection 'cache' in the call before, {} at first.

    None where that collection is not mutable, or the framework has none (NNX): then nothing is to
    be written.
    """
    return self._backend.read_cache(self.module, self._rule.name)

  def write_cache(self, values) -> None:
    """Writes a pytree of arrays into the collection 'cache', for `read_cache` of the next call."""
    self._backend.write_cache(self.module, self._rule.name, values)

  def inputs(self, *args, **kwargs) -> dict[str, jax.Array]:
    """The array arguments of the call by parameter name, the first one first."""
    return named_arrays(getattr(type(self.module), self._rule.method), args, kwargs)

  def arguments(self, *args, **kwargs) -> dict[str, Any]:
    """All arguments of the call by parameter name, arrays and others."""
    return named(getattr(type(self.module), self._rule.method), args, kwargs)

  def changed(self, args, kwargs, change: Callable[[str, Any], Any]) -> tuple[list, dict[str, Any]]:
    """The arguments of the call with change(parameter name, argument) in place of each.

    They are told apart by their places: one array may be given for several parameters.
    """
    places = self.arguments(*range(len(args)), **{key: key for key in kwargs})
    names = {place: name for name, place in places.items()}
    new_args = [change(names[place], a) for place, a in enumerate(args)]
    return new_args, {key: change(names[key], a) for key, a in kwargs.items()}

  def adds(self, name: str, args, kwargs) -> bool:
    """Whether the module adds an array argument as it is to what it computes, as a bias of logits.

    It is read off a trace of the module. A mask that the module selects by, or makes a bias of
    itself, is not added.

    Args:
      name: of the parameter.
      args, kwargs: of the call.
    """
    fn, arrays = self.pure()
    specs, put = taken_apart((args, kwargs))

    def run(given, arrays, specs):
      args, kwargs = put(specs)
      args, kwargs = self.changed(args, kwargs, lambda key, a: given.get(key, a))
      return fn(arrays, *args, **kwargs)

    given = {name: spec_of(self.inputs(*args, **kwargs)[name])}
    use = uses(run, given, arrays, specs).get(name, Use())
    return use.direct and use.primitive in ('add', 'sub')

  def beside(self, args: tuple, kwargs: dict, without: Collection[str] = ()) -> Beside:
    """What the call gets beside its stream, as a pytree to tap: for a module that runs again.

    `fn(arrays, *args, **kwargs)` of `layer` takes what its `with_stream(x)` returns, by position
    and by name as the call had it; flags and `None` go along.

    Args:
      args, kwargs: of the call.
      without: parameters that `with_stream` is given instead.

    Raises:
      ValueError: an argument cannot go along.
    """
    with blame(self._rule, self.site, 'apply'):
      return beside(getattr(type(self.module), self._rule.method), args, kwargs, without)

  def inject(self, **fields):
    """Sets the module's own injection points (attention_fn, ...) while the context lasts."""
    chosen = {}
    for name, new in fields.items():
      chosen[name] = self._where_active(new, getattr(self.module, name) or PRODUCTS.get(name))
    return inject(self.module, **chosen)

  def _where_active(self, new: Callable, old: Callable) -> Callable:
    """`new`; in a stack `old` in the layers where the rule does not act."""
    if self._active is None:
      return new

    def choose(*args, **kwargs):
      return jnp.where(self._active, new(*args, **kwargs), old(*args, **kwargs))

    return choose

  def attend(self, wrap: Callable[[Callable], Callable], *args, **kwargs):
    """Runs the wrapped call with wrap(attention_fn) as the attention function of the module.

    attention_fn(query, key, value, bias=None, mask=None, ...) is what the module attends by: its
    own field, or, where it computes attention inline, that of its anatomy. A rule that calls this
    says so by `requires='attention'`; then `site.heads` is (kv heads, head size) in its `init`.

    Args:
      wrap: attention_fn -> another function that is called in the same way: with a query
        [B, N, heads, head size] and key and value [B, M, kv heads, head size], the arguments of
        `flax.linen.dot_product_attention`; it gives [B, N, heads, head size].
      *args, **kwargs: of the call.

    Raises:
      ValueError: the attention of the module is out of reach.
    """
    why = refusal(self._rule, self.site)
    if why is not None:
      raise ValueError(why)
    if self.site.inline:

      def chosen(attention_fn):
        return self._where_active(wrap(attention_fn), attention_fn)

      with wrapped_too(self.site.path, chosen):
        return self(*args, **kwargs)
    with self.inject(attention_fn=wrap(self.module.attention_fn)):
      return self(*args, **kwargs)

  def outside(self):
    """A context in which modules of the rule's own run; no other rule acts on them."""
    return self._backend.outside()

  def rng(self, what: str, *, optional: bool = False) -> jax.Array | None:
    """A random key for one layer and step in training, None in evaluation.

    Args:
      what: it is for. The same gets the same key in one call, something else gets another.
      optional: None too where the model trains and no key was given.

    Raises:
      ValueError: the model trains, and no key was given.
    """
    if not self.training:
      return None
    if self._key is None:
      if optional:
        return None
      raise ValueError(
        f'{what} at {self.site.path!r} needs a random key: call '
        "tuned.apply(..., rngs={'dropout': key})"
      )
    if self._purpose is None:
      self._purpose = what
    if what == self._purpose:
      return self._key
    return named_key(self._key, what)

  def pure(self, records: bool = True) -> tuple[Callable, Any]:
    """(fn, arrays): the wrapped module as a pure function fn(arrays, *args, **kwargs).

    It serves to reverse, recompute or compress a block, or to run it again. The rules that act
    before this one act inside; what the module writes (caches, statistics, taps) is dropped.

    Args:
      records: whether rules inside may record arrays, which are dropped; if not, fn raises a
        ValueError.
    """
    fn, arrays = self._backend.pure(self.module, self.site.path, self._rule.method)
    return _limited(fn, self.site.path, self._position, records), arrays

  def layer(self, site: Site, index: int | None = 0) -> tuple[Callable, Any]:
    """(fn, arrays): a module elsewhere in the model as a pure function, as in `pure`.

    Of its rules those before the method's own act inside. Its train flag is set to `training`. The
    arrays include the random keys of its dropout: what it computes is the same each time.

    Args:
      site: where, outside of any other module's scan.
      index: which layer of a stack; None for all: then the arrays are [layers, ...], and fn takes
        those of one layer.
    """
    fn, arrays, signature = self._backend.layer(self.module, site, index)
    flags = flags_of(signature, self.training)

    def with_flags(arrays, *args, **kwargs):
      given = given_by_position(signature, len(args))
      further = {name: flag for name, flag in flags.items() if name not in given}
      return fn(arrays, *args, **{**further, **kwargs})

    return _limited(with_flags, site.path, self._position_at(site.path)), arrays

  def saving(self, pack: Callable, unpack: Callable) -> Callable:
    """The wrapped call, with what its backward pass stores as pack(array).

    Args:
      pack: array -> pytree, for every array that the backward pass stores and that is no array of
        the module itself.
      unpack: the inverse.

    Returns:
      A function of positional arguments, differentiable once in them and in what the module reads.
    """
    fn, arrays = self.pure()
    # The structure of the vjp, and which of its leaves are arrays of the module.
    traced = []

    @jax.custom_vjp
    def run(arrays, args):
      return fn(arrays, *args)

    def forward(arrays, args):
      out, vjp = jax.vjp(lambda arrays, args: fn(arrays, *args), arrays, args)
      leaves, tree = jax.tree.flatten(vjp)
      own = [id(x) for x in jax.tree.leaves(arrays)]
      places = [own.index(id(x)) if id(x) in own else None for x in leaves]
      traced[:] = [(tree, places)]
      packed = [pack(x) for x, place in zip(leaves, places, strict=True) if place is None]
      return out, (packed, arrays)

    def backward(residuals, cotangent):
      # Tied to the cotangent: XLA could else unpack early, or keep the wide values after all.
      (packed, arrays), cotangent = jax.lax.optimization_barrier((residuals, cotangent))
      tree, places = traced[0]
      own = jax.tree.leaves(arrays)
      stored = iter(packed)
      leaves = [unpack(next(stored)) if place is None else own[place] for place in places]
      return jax.tree.unflatten(tree, leaves)(cotangent)

    run.defvjp(forward, backward)
    return lambda *args: run(arrays, args)


def with_outer(rule: Weight, site: Site, t):
  """t with the entries that a Weight reads of a call around (`Weight.outer`).

  Raises:
    ValueError: no rule of the method put them into its `local`.
  """
  found = {}
  for entry in rule.outer:
    around = [local for name, local in _running.get() if name == rule.name and entry in local]
    if not around:
      raise ValueError(
        f'{rule.name} at {site.path!r} reads {entry!r} of a call around it (outer=), and no Call '
        f'called {rule.name!r} around it has put that into call.local'
      )
    found[entry] = jnp.asarray(around[-1][entry])
  return {**t, **found}


def check_scalars(rule: Weight, site: Site, t) -> None:
  """Raises a ValueError if a rule that acts through its kernel reads other than scalars around."""
  for entry in rule.outer:
    if jnp.ndim(t[entry]):
      raise ValueError(
        f'{rule.name} at {site.path!r} reads {entry!r} of shape {jnp.shape(t[entry])}, and here '
        'acts through the kernel, which serves all examples: that takes a scalar, or a rule with '
        'dot at a layer that offers its product'
      )


def acting(rules: list, path: str) -> list:
  """The rules at a path that act: all, or the first ones where a rule runs what it wraps."""
  return rules[: _limits.get({}).get(path, len(rules))]


def _limited(fn: Callable, path: str, count: int, records: bool = True) -> Callable:
  """fn(arrays, ...) with the first `count` of the rules at a path, and nothing recorded.

  Where rules may not record (`records`), one that does is an error.
  """
  # fn may be traced later than the rules around it run: then they are around it as they were.
  around = wraps()
  running = _running.get()

  def run(arrays, *args, **kwargs):
    limits = _limits.set({**_limits.get({}), path: count})
    calls = _running.set(running)
    drops = _drops.set(_drops.get() and records)
    try:
      with wrapped(around):
        return fn(arrays, *args, **kwargs)
    finally:
      _drops.reset(drops)
      _running.reset(calls)
      _limits.reset(limits)

  return run


def run_call(rule: Call, theta, bound: Bound, *args, **kwargs):
  """Runs a Call in the dtype of its input; its output has the dtypes of what it wraps."""
  wrapped = bound._run
  dtypes = []

  def recording(*own_args, **own_kwargs):
    _check_passed(rule, bound.site, (args, kwargs), (own_args, own_kwargs))
    out = wrapped(*own_args, **own_kwargs)
    dtypes.append([getattr(x, 'dtype', None) for x in jax.tree.leaves(out)])
    return out

  bound._run = recording
  around = _running.get()
  of_method = [local for name, local in around if name == rule.name]
  if of_method:
    bound.root = of_method[0]
    bound.outer = of_method[-1]
  token = _running.set((*around, (rule.name, bound.local)))
  try:
    dtype = _input_dtype(bound.site, args, kwargs)
    with blame(rule, bound.site, 'apply'):
      out = rule.apply(cast(theta, dtype, rule.exact), bound, *args, **kwargs)
  finally:
    _running.reset(token)
  if out is None and bound.site.out is not None:
    raise ValueError(
      f'apply of {rule.name!r} at {bound.site.path!r} returns nothing: return what the call gives'
    )
  leaves, tree = jax.tree.flatten(out)
  if not dtypes or len(dtypes[-1]) != len(leaves):  # the rule returns something of its own
    return out
  leaves = [_with_dtype(x, dtype) for x, dtype in zip(leaves, dtypes[-1], strict=True)]
  return jax.tree.unflatten(tree, leaves)


def _check_passed(rule: Call, site: Site, given, passed) -> None:
  """Raises a ValueError if a rule does not pass on what the module is called with."""
  args, kwargs = given
  own_args, own_kwargs = passed
  dropped = [name for name in kwargs if name not in own_kwargs and name not in rule.takes]
  # Arguments may change between position and name.
  missing = len(args) + len(dropped) - len(own_args) - len(set(own_kwargs) - set(kwargs))
  if missing > 0:
    lost = ', '.join(dropped) or f'{missing} by position'
    raise ValueError(
      f'apply of {rule.name!r} at {site.path!r} drops arguments of the call ({lost}): take and '
      'pass on *args and **kwargs'
    )


def run_if(active: jax.Array, run: Callable, bound: Bound, *args, **kwargs):
  """Runs a Call in a layer of a stack where it may not act: then the layer is as without it.

  All layers of a stack are one program. The layer runs once, on its own input or on what the rule
  makes of it, and its output or what the rule makes of it comes out.

  Args:
    active: a traced bool.
    run: (*args, **kwargs) -> what the rule makes of the call.
    bound: the rule's.

  Raises:
    ValueError: the rule does not call the layer exactly once, or changes shapes.
  """
  wrapped = bound._run
  plain = []
  where = (
    f'{bound._rule.name} at {bound.site.path!r} acts in some layers of a stack (layers=), which '
    'are one program'
  )

  def select(new, old):
    if jax.tree.structure(new) != jax.tree.structure(old):
      raise ValueError(f'{where}: it must keep the arguments and the output of the layer')
    return jax.tree.map(choose, new, old)

  def choose(new, old):
    if not hasattr(old, 'shape'):
      return new
    if jnp.shape(new) != jnp.shape(old):
      raise ValueError(f'{where}: it must keep shapes, and makes {new.shape} of {old.shape}')
    return jnp.where(active, new, old)

  def once(*new_args, **new_kwargs):
    chosen, chosen_kwargs = select((new_args, new_kwargs), (args, kwargs))
    out = wrapped(*chosen, **chosen_kwargs)
    plain.append(out)
    return out

  bound._run = once
  bound._active = active
  out = run(*args, **kwargs)
  if len(plain) != 1:
    raise ValueError(f'{where}: it must call the layer once, and called it {len(plain)} times')
  return select(out, plain[0])


def _input_dtype(site: Site, args, kwargs):
  """The dtype of the first array of floats that a call gets, else that of its output."""
  for x in jax.tree.leaves((args, kwargs)):
    if hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jnp.floating):
      return x.dtype
  return site.out.dtype


def _with_dtype(x, dtype):
  if dtype is None or not hasattr(x, 'astype') or x.dtype == dtype:
    return x
  return x.astype(dtype)
