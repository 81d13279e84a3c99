"""Encodes the kernels of a backbone in 4 bits: all at once, or layer by layer from a file."""

import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Box, Leaf, Site, Sites, backend_of, join_path, sites_of

from .boxes import Quantized, each_matrix, encoded, encoded_shapes
from .formats import Format

_WEIGHTS_AT_ONCE = 2**18  # of a kernel, while a file is read


def quantize(
  model,
  form: Format,
  backbone,
  /,
  *args,
  targets: str = '{linear}',
  implementation: str = 'auto',
  **kwargs,
):
  """The backbone with its kernels in 4 bits, for `attach` and for the model itself.

  Args:
    model: a Linen or an NNX module; it is read, never changed.
    form: such as `nf4()` or `nf4(double=True)`.
    backbone: what the model stores; under jax.eval_shape nothing is computed.
    *args: an example input; shapes will do.
    targets: pattern of the modules whose kernels are quantized. Biases, norms and tables stay.
    implementation: 'auto' multiplies by `pallas_kernels` where `pallas_kernels.choice` says so, on
      TPU and GPU; 'xla' decodes and multiplies by XLA.
    **kwargs: keyword arguments of the forward pass.

  Raises:
    ValueError: no kernel lies at `targets`; or `implementation` is neither 'auto' nor 'xla'.
  """
  check_implementation(implementation)
  backend = backend_of(model)
  arrays = dict(backend.arrays(model, backbone))
  sites = sites_of(model, backbone, *args, **kwargs)
  for path, (site, name) in kernels(sites, targets).items():
    if not isinstance(arrays[path], Box):
      arrays[path] = _quantized(form, site, name, arrays[path], implementation)
  return backend.replace(model, backbone, arrays)


def check_implementation(name: str) -> None:
  """Raises a ValueError if `implementation` of `quantize` is unknown."""
  if name not in ('auto', 'xla'):
    raise ValueError(f"implementation={name!r} must be 'auto' or 'xla'")


def kernels(sites: Sites, targets: str) -> dict[str, tuple[Site, str]]:
  """{path of an array: (site, name)} of the kernels at a pattern.

  Raises:
    ValueError: there is none.
  """
  found = {}
  for site in sites.find(targets):
    if site.part:
      raise ValueError(
        f'{targets!r} names {{{site.part}}}, a part of {site.owner!r}: a kernel is stored as a '
        'whole, so name the module'
      )
    for name in site.matrices:
      found[join_path(site.path, name)] = (site, name)
  if not found:
    near = ', '.join(sites.nearest(targets))
    raise ValueError(f'no kernel lies at {targets!r}. Near it, of {len(sites)} sites: {near}')
  return found


def _quantized(form: Format, site: Site, name: str, w: jax.Array, implementation: str) -> Quantized:
  """The box of a stored kernel."""
  leaf = site.leaves[name]
  layers = site.stack_first(w).reshape(-1, *leaf.shape)
  # One layer after the other, so that encoding needs the memory of one layer beside its result.
  arrays = jax.lax.map(functools.partial(_encoded_jit, form, leaf), layers)
  return _box(form, site, name, arrays, implementation)


def coded(
  form: Format, site: Site, name: str, layers: Iterable[np.ndarray], implementation: str = 'auto'
) -> Quantized:
  """A kernel from its layers, which are read one at a time.

  Needs the memory of one layer in the dtype that it is read in, and of encoding some of its
  columns, beside the result.
  """
  leaf = site.leaves[name]
  # The nested scales of a double format depend on all scales: they come last.
  single = form.single()
  arrays = {}
  for key, x in encoded_shapes(single, leaf).items():
    arrays[key] = jnp.zeros((site.layers, *x.shape), x.dtype)
  columns = _columns_at_once(form, leaf)
  layer = 0  # not by `enumerate`, which would keep a reference to a layer
  for w in layers:
    w = leaf.fold(w)
    for start in range(0, leaf.fan_out, columns):
      part = w[..., start : start + columns]
      # Waits, because reading is faster than encoding: parts would pile up in memory.
      arrays = jax.block_until_ready(_write(single, leaf, arrays, part, layer, start))
    del w, part  # frees the layer before the next one is read
    layer += 1
  if form.double:
    arrays |= _nested(form, leaf, arrays.pop('absmax'))
  return _box(form, site, name, arrays, implementation)


def _columns_at_once(form: Format, leaf: Leaf) -> int:
  """How many columns of a layer are encoded at once: all of them where blocks cross columns."""
  if not form.aligned((leaf.fan_in, leaf.fan_out)):
    return leaf.fan_out
  most = max(1, _WEIGHTS_AT_ONCE // leaf.fan_in)
  return 2 ** int(math.log2(most))


def _box(
  form: Format, site: Site, name: str, arrays: dict[str, jax.Array], implementation: str
) -> Quantized:
  """The box of encoded layers [layers, ...].

  Raises:
    ValueError: layers are stacked on axes that are counted from the back.
  """
  if any(axis < 0 for axis in site.axes):
    raise ValueError(
      f'the layers at {site.path!r} are stacked on the axes {site.axes}, counted from the back, '
      'which 4-bit storage does not support'
    )
  stored = {}
  for key, x in arrays.items():
    stacked = x.reshape(*site.lengths, *x.shape[1:])
    stored[key] = site.stack_restore(stacked)
  return Quantized(stored, form, site.leaves[name], site.axes, implementation)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _write(form: Format, leaf: Leaf, arrays, w, layer, start):
  """Encodes columns `w` of a layer and writes them into the arrays [layers, ...], from `start`."""
  part = each_matrix(form.encode, leaf)(w.astype(leaf.dtype))
  written = {}
  for key, x in arrays.items():
    middle = [0] * (x.ndim - 2)
    written[key] = jax.lax.dynamic_update_slice(x, part[key][None], (layer, *middle, start))
  return written


@functools.partial(jax.jit, static_argnums=(0, 1))
def _nested(form: Format, leaf: Leaf, absmax):
  """The scales [layers, ...] in 8 bits."""
  nest = functools.partial(form.nest, shape=(leaf.fan_in, leaf.fan_out))
  return jax.lax.map(each_matrix(nest, leaf), absmax)


_encoded_jit = jax.jit(encoded, static_argnums=(0, 1))
