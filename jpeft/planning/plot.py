"""A plot of memory against FLOPs."""

from collections.abc import Iterable

from .result import Plan


def plot(plans: Iterable[Plan], path: str) -> None:
  """Draws memory against FLOPs, one point a method, and the limit of the device.

  Raises:
    ImportError: matplotlib is not installed.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  plans = list(plans)
  figure = Figure(figsize=(7, 4.5), layout='constrained')
  FigureCanvasAgg(figure)
  axis = figure.subplots()
  for plan in plans:
    point = plan.total / 2**20, plan.flops / 1e9
    marker = 'o' if plan.exact else '>'
    color = 'C3' if plan.fits is False else 'C0'
    axis.plot(*point, marker, color=color)
    axis.annotate(plan.method, point, xytext=(4, 4), textcoords='offset points', fontsize=8)
  first = plans[0]
  if first.limit is not None:
    axis.axvline(first.limit / 2**20, color='grey', linestyle='--', linewidth=1)
  axis.set(
    xlabel=f'MiB on {first.target}',
    ylabel='GFLOP an update',
    xscale='log',
    title=f'batch {first.batch}; red: does not fit',
  )
  axis.set_ylim(0)
  axis.grid(alpha=0.3)
  figure.savefig(path, dpi=110)
