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
  for p in plans:
    axis.plot(
      p.total / 2**20,
      p.flops / 1e9,
      'o' if p.exact else '>',
      color='C3' if p.fits is False else 'C0',
    )
    axis.annotate(
      p.method,
      (p.total / 2**20, p.flops / 1e9),
      xytext=(4, 4),
      textcoords='offset points',
      fontsize=8,
    )
  if plans[0].limit is not None:
    axis.axvline(plans[0].limit / 2**20, color='grey', linestyle='--', linewidth=1)
  axis.set(
    xlabel=f'MiB on {plans[0].target}',
    ylabel='GFLOP an update',
    xscale='log',
    title=f'batch {plans[0].batch}; red: does not fit',
  )
  axis.set_ylim(0)
  axis.grid(alpha=0.3)
  figure.savefig(path, dpi=110)
