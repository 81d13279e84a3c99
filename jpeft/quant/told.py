"""What multiplies by the 4-bit kernels of a model, in words."""

import itertools
import math
from collections.abc import Sequence

import pallas_kernels
from jpeft.core import Multiplied, Sites

_PLATFORMS = {'gpu': 'cuda'}  # devices say gpu, programs are lowered for cuda


def told(sites: Sites, products: Sequence[Multiplied], mesh) -> str:
  """How many kernels are multiplied by Pallas, and why others are not; '' without any.

  Args:
    sites: of the model.
    products: of a traced program of it, from `core.noting`.
    mesh: of the devices that the program is for.
  """
  platform = mesh.devices.flat[0].platform
  platform = _PLATFORMS.get(platform, platform)
  noted = {product.site.path: product for product in products}
  by_kernel = 0
  others: dict[str, list[str]] = {}
  count = 0
  for path, site in sites.items():
    for name in site.boxes:
      count += site.layers
      why = 'their layers have no injection point'
      if path in noted and name in site.matrices:
        why = _why_not(noted[path], platform, mesh)
      if why is None:
        by_kernel += site.layers
      else:
        others.setdefault(why, []).extend([path] * site.layers)
  if not count:
    return ''
  lines = [f'{by_kernel:,} of {count:,} 4-bit kernels are multiplied by Pallas']
  for why, paths in others.items():
    lines.append(f'{len(paths):,} by XLA, such as {paths[0]}: {why}')
  return '; '.join(lines)


def _why_not(product: Multiplied, platform: str, mesh) -> str | None:
  """Why a product runs by XLA; None if a kernel runs it."""
  if product.refusal is not None:
    return product.refusal
  leaf = product.site.leaves[product.site.matrices[0]]
  leading = product.shape[:-1]
  axes, columns = pallas_kernels.shares(mesh, leading, leaf.fan_out)
  rows = math.prod(leading) // math.prod(mesh.shape[axis] for axis in itertools.chain(*axes))
  fan_out = leaf.fan_out
  if columns is not None:
    fan_out //= mesh.shape[columns]
  shape = (leaf.fan_in, fan_out)
  chosen = pallas_kernels.choice(rows, shape, product.dtype, platform, product.box.form)
  if chosen.implementation == 'xla':
    return chosen.reason
  return None
