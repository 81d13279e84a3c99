"""Reads the sites of a model off one forward pass, traced on shapes."""

import dataclasses
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import jax

from . import anatomy
from .attention import never_called
from .backends.choice import backend_of
from .boxes import Box, Probe
from .example import spec_of, taken_apart
from .injection import inject, offered
from .layers import numbered
from .paths import join_path
from .sites import Leaf, Site, Sites
from .stacks import Shape, stack_axes
from .trace import Use, uses

_traces = itertools.count()


@dataclasses.dataclass
class _Seen:
  """What one forward pass shows of a module; the defaults are those of one that is never called.

  Attributes:
    shapes: {'path/name': shape} of the arrays in it, as one call sees them.
    calls: how often it is called.
    Others: see `Site`.
  """

  kind: str = ''
  inputs: dict[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)
  out: jax.ShapeDtypeStruct | None = None
  out_path: tuple[Any, ...] = ()
  sources: dict[str, str] = dataclasses.field(default_factory=dict)
  fields: tuple[str, ...] = ()
  heads: tuple[int, int] | None = None
  module: Any = None
  methods: tuple[str, ...] = ()
  shapes: dict[str, Shape] = dataclasses.field(default_factory=dict)
  calls: int = 0


def sites_of(model, backbone, /, *args, **kwargs) -> Sites:
  """Every module of the model, found by tracing one forward pass on shapes.

  Args:
    model: a Linen or an NNX module.
    backbone: Linen's variables or `nnx.state(model)`; shapes will do.
    *args: an example input; shapes will do.
    **kwargs: keyword arguments of the forward pass.
  """
  arrays = backend_of(model).arrays(model, backbone)
  specs = {key: spec_of(x) for key, x in arrays.items()}
  takes_boxes = True
  try:
    seen, used = _traced(model, backbone, specs, args, kwargs, Probe)
  except Exception:  # whatever the model raises of what it does not expect
    takes_boxes = False
    seen, used = _traced(model, backbone, specs, args, kwargs)

  owned: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
  for key, spec in specs.items():
    path, _, name = key.rpartition('/')
    owned.setdefault(path, {})[name] = spec

  sites = Sites()
  sites.takes_boxes = takes_boxes
  sites.aliases = backend_of(model).aliases(model)
  shared = set(sites.aliases.values())
  sites.arrays = jax.eval_shape(lambda: arrays)
  for path in dict.fromkeys([*seen, *owned]):
    facts = seen.get(path, _Seen())
    axes = _stack(path, specs, facts.shapes, used)
    leaves = {}
    for name, spec in owned.get(path, {}).items():
      use = used.get(join_path(path, name), Use())
      # A kernel that others read too, or that is read twice, is more than what one product reads.
      is_shared = join_path(path, name) in shared or use.count > facts.calls
      leaves[name] = _leaf(spec, use._replace(direct=use.direct and not is_shared), axes)
    site = Site(
      path=path,
      kind=facts.kind,
      leaves=leaves,
      inputs=facts.inputs,
      out=facts.out,
      out_path=facts.out_path,
      sources=facts.sources,
      fields=facts.fields,
      axes=axes,
      lengths=_lengths(path, specs, axes),
      heads=facts.heads,
      module=facts.module,
      methods=facts.methods,
      boxes={},
      model=sites,
    )
    for name in leaves:
      box = sites.arrays[join_path(path, name)]
      if isinstance(box, Box):
        site.boxes[name] = _one_layer(site, box)
    sites[path] = site
  sites.families = anatomy.families_of(sites)
  _find_inline(model, backbone, sites, specs, args, kwargs)
  numbered(sites)
  return sites


def _traced(
  model, backbone, specs: dict, args, kwargs, wrap: Callable = lambda x: x
) -> tuple[dict[str, _Seen], dict[str, Use]]:
  """({path: what is seen of a module}, {'path/name': how an array is used}) of a forward pass.

  `wrap` makes of each array what the model gets.
  """
  backend = backend_of(model)
  seen: dict[str, _Seen] = {}

  def recorder():
    return _recorder(seen, backend)

  forward, traced = _forward(model, backbone, specs, args, kwargs, recorder, wrap=wrap)
  return seen, uses(forward, specs, traced)


def _forward(
  model,
  backbone,
  specs: dict,
  args,
  kwargs,
  hook: Callable,
  wanted: frozenset[tuple[str, str]] | None = None,
  wrap: Callable = lambda x: x,
) -> tuple[Callable, tuple]:
  """(forward, arrays): a forward pass as a function of weights like `specs` and of these arrays.

  Args:
    model, backbone, specs, args, kwargs: see `sites_of`.
    hook: () -> the hook of a pass, see `Backend.run`.
    wanted: where it acts.
    wrap: makes of each weight what the model gets.
  """
  backend = backend_of(model)
  inputs, put = taken_apart((args, kwargs))
  # What the model stores beside its weights, such as statistics, where only shapes are given.
  stored, structure = jax.tree.flatten(backbone)
  shapes = {i: x for i, x in enumerate(stored) if isinstance(x, jax.ShapeDtypeStruct)}
  # Empty, under a name of this trace: a layer that the model jits itself would else be answered
  # from the cache of an earlier trace, and its modules would not be seen.
  mark = {f'trace{next(_traces)}': {}}
  fresh = {path.rpartition('/')[0]: mark for path in specs}

  def forward(flat, traced):
    inputs, shapes = traced
    args, kwargs = backend.fresh(put(inputs))
    given = structure.unflatten([shapes.get(i, x) for i, x in enumerate(stored)])
    arrays = {name: wrap(x) for name, x in flat.items()}
    out, _ = backend.run(model, given, arrays, fresh, hook(), wanted, False, args, dict(kwargs))
    return out

  return forward, (inputs, shapes)


def looks_like_array(x) -> bool:
  return hasattr(x, 'shape') and hasattr(x, 'dtype')


def named_arrays(fn: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
  """The array arguments of a method call by parameter name, the first one first."""
  return {name: x for name, x in named(fn, args, kwargs).items() if looks_like_array(x)}


def named(fn: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
  """All arguments of a method call by parameter name; positions where there is no name."""
  try:
    given = inspect.signature(fn).bind(None, *args, **kwargs)
  except (TypeError, ValueError):
    return {**{str(i): x for i, x in enumerate(args)}, **kwargs}
  found: dict[str, Any] = {}
  for name, value in given.arguments.items():
    kind = given.signature.parameters[name].kind
    if kind is inspect.Parameter.VAR_POSITIONAL:
      found |= {str(i): x for i, x in enumerate(value)}
    elif kind is inspect.Parameter.VAR_KEYWORD:
      found |= value
    else:
      found[name] = value
  return found


def _stream(out, read: jax.ShapeDtypeStruct | None) -> tuple[tuple[Any, ...], Any]:
  """(path, array) of the stream in a module's output, as far as shapes show it.

  Args:
    out: the output.
    read: the first array that the module is called with.
  """
  arrays = [pair for pair in jax.tree_util.tree_leaves_with_path(out) if looks_like_array(pair[1])]
  if not arrays:
    return (), None
  for pair in arrays:
    if read is not None and pair[1].shape == read.shape:
      return pair
  return arrays[0]


class _Outputs:
  """The arrays that modules return, by which later modules are called."""

  def __init__(self, seen: dict[str, _Seen]):
    self._seen = seen
    self._made: dict[int, tuple[str, tuple, Any]] = {}  # by id; the array is kept, as is its id
    self._read: set[int] = set()

  def add(self, path: str, out) -> None:
    for where, x in jax.tree_util.tree_leaves_with_path(out):
      if looks_like_array(x):
        self._made[id(x)] = (path, where, x)

  def read(self, inputs: dict[str, Any]) -> dict[str, str]:
    """{parameter name: path of the module that returned it} of the inputs of a call.

    What a module reads first is the stream of the module that returned it.
    """
    sources = {name: self._made[id(x)][0] for name, x in inputs.items() if id(x) in self._made}
    first = next(iter(inputs.values()), None)
    if id(first) in self._made and id(first) not in self._read:
      self._read.add(id(first))
      path, where, x = self._made[id(first)]
      self._seen[path].out_path = where
      self._seen[path].out = spec_of(x)
    return sources


def _recorder(seen: dict[str, _Seen], backend):
  """A hook that records what each module is called with, returns and offers."""
  outputs = _Outputs(seen)

  def hook(path, method, module, call, extras, taps):
    def recorded(*args, **kwargs):
      fields = offered(module)
      inputs = named_arrays(getattr(type(module), method), args, kwargs)
      sources = outputs.read(inputs)
      shapes = backend.shapes_inside(module)
      heads = []
      if 'attention_fn' in fields:
        with inject(module, attention_fn=_recording_heads(module.attention_fn, heads)):
          out = call(*args, **kwargs)
      else:
        out = call(*args, **kwargs)
      before = seen.get(path)
      methods = before.methods if before else ()
      calls = before.calls if before else 0
      if method == '__call__' or before is None:
        specs = {name: spec_of(x) for name, x in inputs.items()}
        # No module reads what the model itself returns: there the first array it is.
        read = next(iter(specs.values()), None) if path else None
        out_path, stream = _stream(out, read)
        outputs.add(path, out)
        seen[path] = _Seen(
          kind=type(module).__name__,
          inputs=specs,
          out=None if stream is None else spec_of(stream),
          out_path=out_path,
          sources=sources,
          fields=fields,
          heads=heads[0] if heads else None,
          module=backend.template(module),
          shapes=shapes,
        )
      seen[path].methods = tuple(dict.fromkeys((*methods, method)))
      seen[path].calls = calls + (method == '__call__')
      return out

    return recorded

  return hook


def _recording_heads(attention: Callable, heads: list) -> Callable:
  """An attention function that also records (key heads, head size)."""

  def recording(query, key, value, *args, **kwargs):
    heads.append(tuple(key.shape[-2:]))
    return attention(query, key, value, *args, **kwargs)

  return recording


def _find_inline(model, backbone, sites: Sites, specs: dict, args, kwargs) -> None:
  """Tries the family's form of attention at the {attention} sites that attend inline.

  The sites get their `heads`, or say what is wrong with the form.
  """
  family = sites.anatomy
  if family is None or family.attention is None:
    return
  tried = []
  for site in sites.find('{attention}'):
    if site.heads is None and '__call__' in site.methods:
      tried.append(site.path)
  if not tried:
    return
  heads: dict[str, list] = {path: [] for path in tried}
  faults: dict[str, str] = {}
  hook = _inline_trial(family, backend_of(model), heads, faults)
  wanted = frozenset((path, '__call__') for path in tried)
  forward, traced = _forward(model, backbone, specs, args, kwargs, lambda: hook, wanted)
  jax.eval_shape(forward, specs, traced)
  for path in tried:
    fault = faults.get(path, '')
    found = None if fault else heads[path][0]
    sites[path] = dataclasses.replace(
      sites[path], heads=found, inline=not fault, inline_fault=fault
    )


def _inline_trial(family: anatomy.Anatomy, backend, heads: dict[str, list], faults: dict[str, str]):
  """A hook that runs a copy of each module in the inline form of its family, beside the module.

  Args:
    family: whose `attention` is tried.
    backend: of the model.
    heads: {path: a list that gets (key heads, head size) of each call of the attention function}.
    faults: {path: what is wrong with the form there}, filled in.
  """
  running = set()
  name = f'the `attention` of the anatomy {family.name!r}'

  def hook(path, method, module, call, extras, taps):
    def form(*args, **kwargs):
      attention_fn = _recording_heads(family.attention_fn, heads[path])
      return family.attention(module, attention_fn, *args, **kwargs)

    def beside(*args, **kwargs):
      fn, arrays = backend.pure(module, path)
      out = call(*args, **kwargs)
      running.add(path)
      try:
        made = jax.eval_shape(lambda: fn(arrays, *args, **kwargs))
      except Exception as error:  # whatever a function of the user raises
        faults[path] = f'{name} fails there: {type(error).__name__}: {error}'
        return out
      finally:
        running.discard(path)
      if not heads[path]:
        faults[path] = never_called(family)
      elif _shapes(made) != _shapes(out):
        faults[path] = f'{name} returns {_shapes(made)} in place of {_shapes(out)}'
      return out

    return form if path in running else beside  # the copy comes here too

  return hook


def _shapes(out) -> Any:
  return jax.tree.map(lambda x: getattr(x, 'shape', None), out)


def _stack(path: str, specs: dict, shapes: dict[str, Shape], used: dict[str, Use]):
  """The axes that scans and vmaps around a module added to the arrays in it.

  A module that was called saw its own slice of them. Where the arrays of a module are read by
  others, the jaxpr shows the scans.
  """
  # In NNX an array that several modules share has the path of the first of them alone.
  here = {name: shape for name, shape in shapes.items() if join_path(path, name) in specs}
  if here:
    stored = [specs[join_path(path, name)].shape for name in here]
    return stack_axes(stored, list(here.values()))
  own = [use.scanned for key, use in used.items() if key.rpartition('/')[0] == path]
  return min(own, key=len, default=())


def _lengths(path: str, specs: dict, axes: tuple[int, ...]) -> tuple[int, ...]:
  """The sizes of the stacking axes of a module, from the first array in it."""
  if not axes:
    return ()
  prefix = f'{path}/' if path else ''
  for key, spec in specs.items():
    if f'{key}/'.startswith(prefix):
      return tuple(spec.shape[axis] for axis in axes)
  return ()


def _one_layer(site: Site, box: Box):
  """The shapes of one layer of a box."""
  return jax.eval_shape(lambda box: jax.tree.map(lambda x: site.take(x, 0), box), box)


def _leaf(spec: jax.ShapeDtypeStruct, use: Use, axes: tuple[int, ...]) -> Leaf:
  """An array as a single layer sees it: the stacking axes are removed."""
  stacked = {axis % len(spec.shape) for axis in axes}
  own = [axis for axis in range(len(spec.shape)) if axis not in stacked]
  position = {axis: i for i, axis in enumerate(own)}

  def in_layer(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(position[axis] for axis in axes if axis in position)

  return Leaf(
    shape=tuple(spec.shape[axis] for axis in own),
    dtype=spec.dtype,
    use=use.primitive,
    ins=in_layer(use.ins),
    batch=in_layer(use.batch),
    offset=use.offset,
    direct=use.direct,
  )
