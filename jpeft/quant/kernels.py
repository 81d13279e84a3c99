"""Kernels of a backbone to 4 bits: all at once, or one layer after the other while a file is
read.
"""

import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.core import Box, Leaf, Site, Sites, backend_of, join_path, sites_of

from .boxes import Quantized, _each, _encoded, _shapes
from .formats import Format

_SLICE = 2**18  # weights of a kernel that are coded at once


def quantize(model, form: Format, backbone, /, *args, targets: str = '{linear}', **kwargs):
  """The backbone with its kernels in 4 bits, for `attach` and for the model itself.

  Args:
    model: a Linen or an NNX module; it is read, never changed.
    form: such as `nf4()` or `nf4(double=True)`.
    backbone: what the model holds; under jax.eval_shape nothing is computed.
    *args: an example input; shapes will do.
    targets: pattern of the modules whose kernels are quantized. Biases, norms and tables stay.
    **kwargs: keyword arguments of the forward pass.

  Raises:
    ValueError: no kernel lies at `targets`.
  """
  backend = backend_of(model)
  flat = dict(backend.arrays(model, backbone))
  for path, (site, name) in kernels(sites_of(model, backbone, *args, **kwargs), targets).items():
    if not isinstance(flat[path], Box):
      flat[path] = _boxed(form, site, name, flat[path])
  return backend.replace(model, backbone, flat)


def kernels(sites: Sites, targets: str) -> dict[str, tuple[Site, str]]:
  """{path of an array: (site, name)} of the kernels at a pattern.

  Raises:
    ValueError: there is none.
  """
  found = {
    join_path(site.path, name): (site, name)
    for site in sites.find(targets)
    for name in site.matrices
  }
  if not found:
    raise ValueError(
      f'no kernel lies at {targets!r}. Near it, of {len(sites)} sites: '
      f'{", ".join(sites.nearest(targets))}'
    )
  return found


def _boxed(form: Format, site: Site, name: str, w) -> Quantized:
  layers = site.stack_first(w).reshape(-1, *site.leaves[name].shape)
  # One layer after the other: what encoding needs beside its result is that of one layer.
  return _placed(
    form, site, name, jax.lax.map(functools.partial(_encoded_jit, form, site.leaves[name]), layers)
  )


def coded(form: Format, site: Site, name: str, layers: Iterable[np.ndarray]) -> Quantized:
  """A kernel from its layers, which are read one at a time.

  Beside the result a layer is held, in the number format that it is read in, and what coding some
  of its columns needs.
  """
  leaf, plain = site.leaves[name], form.single()
  whole = {n: jnp.zeros((site.layers, *x.shape), x.dtype) for n, x in _shapes(plain, leaf).items()}
  cut = form.aligned((leaf.fan_in, leaf.fan_out))
  columns = 2 ** int(math.log2(max(1, _SLICE // leaf.fan_in))) if cut else leaf.fan_out
  layer = 0
  for w in layers:
    w = leaf.fold(w)
    for start in range(0, leaf.fan_out, columns):
      # Waited for: reading is faster than coding, and what is read ahead would be all there is.
      whole = jax.block_until_ready(
        _put(plain, leaf, whole, w[..., start : start + columns], layer, start)
      )
    del w  # or it would be there still while the next one is read
    layer += 1
  if form.double:
    whole |= _nested(form, leaf, whole.pop('absmax'))
  return _placed(form, site, name, whole)


def _placed(form: Format, site: Site, name: str, arrays) -> Quantized:
  """The box of encoded layers [layers, ...]."""
  if any(axis < 0 for axis in site.axes):
    raise ValueError(
      f'the layers at {site.path!r} are stacked on the axes {site.axes}, counted from the back, '
      'which 4-bit storage does not support'
    )
  arrays = {
    n: site.stack_restore(x.reshape(*site.lengths, *x.shape[1:])) for n, x in arrays.items()
  }
  return Quantized(arrays, form, site.leaves[name], site.axes)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _put(form: Format, leaf: Leaf, whole, w, layer, start):
  """The codes of columns `w` of a layer, put where they belong."""
  part = _each(form.encode, leaf)(w.astype(leaf.dtype))
  at = lambda x: (layer, *[0] * (x.ndim - 1), start)
  return {n: jax.lax.dynamic_update_slice(x, part[n][None], at(part[n])) for n, x in whole.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _nested(form: Format, leaf: Leaf, absmax):
  nest = functools.partial(form.nest, shape=(leaf.fan_in, leaf.fan_out))
  return jax.lax.map(_each(nest, leaf), absmax)


_encoded_jit = jax.jit(_encoded, static_argnums=(0, 1))
