"""What a Call may ask of the model around it."""

import contextvars

import jax

from .boxes import inject
from .discover import named_arrays
from .mode import flags_of
from .paths import natural
from .sites import Site

# (method, scratch) of the wrapped calls that are running, the outermost first.
_running: contextvars.ContextVar[tuple[tuple[str, dict], ...]] = contextvars.ContextVar(
  'jpeft_running', default=()
)
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

  def __init__(
    self,
    run,
    *,
    name: str,
    site: Site,
    module,
    backend,
    path: str,
    method: str,
    rank: int,
    taps,
    key,
    training: bool,
    rank_at=None,
  ):
    self._name, self._run, self._backend, self._path, self._method, self._rank = (
      name,
      run,
      backend,
      path,
      method,
      rank,
    )
    self._taps, self._key, self._rank_at = taps, key, rank_at
    self.site, self.module, self.training = site, module, training
    self.local, self.outer = {}, None

  def __call__(self, *args, **kwargs):
    return self._run(*args, **kwargs)

  def tap(self, **values: jax.Array) -> None:
    """Records arrays under this site; of a scanned layer they come stacked. In `pure` nothing is
    recorded.
    """
    if not _beneath.get({}):
      self._backend.tap(self.module, self._name, values)

  def taps(self) -> dict[str, dict[str, jax.Array]]:
    """{site path: {name: array}} recorded so far, in the order of the layers.

    A method sees what its own rules recorded; one whose rules recorded nothing sees everything.
    """
    taps = dict(sorted(self._taps().items(), key=lambda item: natural(item[0])))
    own = {path: by_rule[self._name] for path, by_rule in taps.items() if self._name in by_rule}
    return own or {
      path: {n: x for t in by_rule.values() for n, x in t.items()} for path, by_rule in taps.items()
    }

  def held(self) -> dict | None:
    """What this rule put into the model's collection 'cache' in the call before, {} at first.

    None where that collection is not mutable, or the framework has none (NNX): nothing is to be
    kept.
    """
    return self._backend.held(self.module, self._name)

  def hold(self, values) -> None:
    """Puts a pytree of arrays into the collection 'cache', for `held` of the call that goes on from
    this one.
    """
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
      raise ValueError(
        f'{what} at {self.site.path!r} needs a random key: call '
        "tuned.apply(..., rngs={'dropout': key})"
      )
    return self._key

  def pure(self):
    """(fn, arrays): the wrapped module as a pure function fn(arrays, *args, **kwargs).

    What reverses, recomputes, compresses or runs a block again is written on it. Other rules act
    inside; what the module writes (caches, statistics, taps) is dropped.
    """
    fn, arrays = self._backend.pure(self.module, self._path)
    return _under(fn, self._path, self._rank), arrays

  def layer(self, site: Site, index: int | None = 0):
    """(fn, arrays): a module elsewhere in the model, called as fn(arrays, *args, **kwargs), as in
    `pure`.

    Of its rules those before the method's own act inside. It is told whether the model trains by
    the flag that its call takes. The arrays hold the random keys of its dropout too: what it
    computes is the same each time.

    Args:
      site: where, outside of any other module's scan.
      index: of a stack, which layer; None for all: the arrays lead with the layers, and fn takes
        those of one.
    """
    fn, arrays, signature = self._backend.layer(self.module, site, index)
    flags = flags_of(signature, self.training)
    rank = self._rank_at(site.path)
    return _under(
      lambda arrays, *a, **kw: fn(arrays, *a, **{**flags, **kw}), site.path, rank
    ), arrays

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


def _under(fn, path: str, rank: int):
  """fn(arrays, ...) with as many of the rules at a path as `rank` says, and nothing recorded."""

  def run(arrays, *args, **kwargs):
    token = _beneath.set({**_beneath.get({}), path: rank})
    try:
      return fn(arrays, *args, **kwargs)
    finally:
      _beneath.reset(token)

  return run
