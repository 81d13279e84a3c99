"""A plot of memory against FLOPs."""

import pathlib
from collections.abc import Iterable

from jpeft import writing

from . import drawing
from .result import Plan


def plot(plans: Iterable[Plan], path: str) -> None:
  """Draws memory against FLOPs, one point a method, and the limit of the device.

  The colour is the memory class; a hollow point does not fit the device.

  Raises:
    ImportError: matplotlib is not installed.
  """
  plans = list(plans)
  figure = drawing.figure(7, 4.8)
  axis = figure.subplots()
  named = []
  for plan in plans:
    point = plan.total / 2**20, plan.flops / 1e9
    fill = 'none' if plan.fits is False else 'full'
    axis.plot(*point, fillstyle=fill, **drawing.style(plan.memory_class))
    named.append((plan.method if plan.exact else f'{plan.method}, or more', point))
  first = plans[0]
  title = f'A step of batch {first.batch} on {first.target}'
  if any(plan.fits is False for plan in plans):
    title += '; hollow: does not fit'
  if first.limit is not None and any(plan.total > 0.1 * first.limit for plan in plans):
    axis.axvline(first.limit / 2**20, color='grey', linestyle='--', linewidth=1)
    title += f'; dashed: its {first.limit / 2**30:.4g} GiB'
  axis.set(xlabel='MiB', ylabel='GFLOP an update')
  axis.set_title(title, fontsize=10)
  drawing.logarithmic(axis)
  axis.margins(x=0.15, y=0.1)
  axis.set_ylim(0)
  axis.grid(alpha=0.3)
  drawing.legend(figure, (plan.memory_class for plan in plans))
  drawing.label(axis, named)
  with writing.appearing(pathlib.Path(path)) as part:
    figure.savefig(part, dpi=110)
