"""What jpeft needs of a framework: the functions that linen.py and nnx.py both offer.

A backend is a Python module, so `self` below is no argument of its functions. In all of them

- `model` is the user's module; it is read, never changed;
- `backbone` is what the model stores: Linen's variables, or `nnx.state(model)`;
- `module` is a module inside a running call of `run`, bound to its arrays;
- 'path/name' is the path of a module and the name of an array that it owns, joined by '/'.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

# {module path: {rule: {name: array}}} of what `tap` has recorded so far.
Taps = Callable[[], dict[str, dict]]

# (path, method, module, call, extras, taps) -> the callable that runs in place of `call`.
Hook = Callable[[str, str, Any, Callable, Mapping, Taps], Callable]


class Backend(Protocol):
  """The functions of a backend."""

  def arrays(self, model, backbone) -> dict[str, Any]:
    """{'path/name': array or box} of all weights; statistics, caches and keys are left out.

    Raises:
      ValueError: `backbone` is not what the model stores.
    """

  def replace(self, model, backbone, flat: Mapping[str, Any]):
    """The backbone with other weights.

    Args:
      flat: {'path/name': array or box}. Metadata such as partition names stays; what is no weight
        stays as it is.
    """

  def shapes_inside(self, module) -> dict[str, tuple[int, ...]]:
    """{'path/name': shape} of all arrays in a module, as one call of it sees them.

    Inside a scan these are the shapes of one layer. Paths start at the module.
    """

  def aliases(self, model) -> dict[str, str]:
    """{'path/name': 'path/name' in `arrays`} for an array that several modules own.

    Empty in Linen, where one module owns an array.
    """

  def stored(self, module, name: str):
    """An array that a module owns, as it is stored: a box stays one."""

  def template(self, module):
    """An unbound copy of a module, its class and fields; None in NNX.

    NNX modules create their arrays when they are made, so none can be made at another width.
    """

  def flagged_modules(self, model) -> list:
    """The modules whose field `deterministic` says whether the model trains.

    In Linen the root alone, since a parent gives its flag to its children; in NNX all, since
    `model.train()` and `model.eval()` set the field in each.
    """

  def fresh(self, inputs):
    """The inputs of a forward pass that may be traced: NNX modules among them are copied.

    A cache that is passed as an argument is written to in NNX.
    """

  def run(
    self,
    model,
    backbone,
    flat: Mapping[str, Any],
    extras: Mapping[str, Any],
    hook: Hook | None,
    wanted: frozenset[tuple[str, str]] | None,
    records: bool,
    args: tuple,
    kwargs: dict,
  ):
    """(output, records) of the model with other weights and with hooks around calls of its modules.

    Args:
      flat: {'path/name': array or box}, the weights.
      extras: {path: pytree} of arrays that are stored beside the parameters of modules. Inside a
        scan or a vmap each layer gets its own slice, as of a parameter.
      hook: makes the callable that runs in place of a method of a module. It is called with the
        extra variables of that module and with a function that returns what was recorded so far.
        In NNX jitted layers are cached by it.
      wanted: {(path, method)} where `hook` acts; None for every public method of every module.
      records: whether rules may record arrays.
      args: of the model's call.
      kwargs: of the model's call, and `rngs`, `mutable` and `method`; these three are removed.

    Returns:
      (the output, what was recorded: {path: {kind: {rule: {name: array}}}}). With `mutable` the
      output is (output, what the call wrote into the model's own variables).
    """

  def record(self, module, kind: str, name: str, values: Mapping[str, jax.Array]) -> None:
    """Records arrays of a kind at a module, under the name of a rule.

    Raises:
      ValueError: the rule has recorded at this module before; in Linen also, a scan broadcasts
        the params of the module, so that nothing comes out of it.
    """

  def has_cache(self, module) -> bool:
    """Whether a module or one in it has a cache of an earlier call, which this call goes on with.

    In Linen that is a part of a mutable collection 'cache', in NNX a Variable `nnx.Cache` of a
    module whose field `decode` is not False.
    """

  def read_cache(self, module, name: str) -> dict | None:
    """What a rule wrote into the model's cache in the call before; {} in the first call.

    None where nothing can be written: in Linen if the collection 'cache' is not mutable, in NNX
    always, since its decoders have no common collection.
    """

  def write_cache(self, module, name: str, values) -> None:
    """Writes a pytree of arrays into the model's cache, under the name of a rule.

    Raises:
      NotImplementedError: in NNX.
    """

  def outside(self) -> contextlib.AbstractContextManager:
    """A context in which modules of a rule's own run; hooks do not act on them."""

  def pure(self, module, path: str, method: str = '__call__'):
    """(fn, arrays): a method of a module as the pure function fn(arrays, *args, **kwargs).

    The arrays are all that it reads, with the random keys of its dropout. What it writes is
    dropped.
    """

  def layer(self, module, site, index: int | None):
    """(fn, arrays, call): another module of the model that `module` is in, as in `pure`.

    Args:
      site: where the other module is; not inside of any scan but its own.
      index: which layer of a stack; None for all, with arrays [layers, ...], of which fn takes
        those of one layer.

    Returns:
      `call` is the `__call__` of its class, whose parameters show which train flag it takes.
    """
