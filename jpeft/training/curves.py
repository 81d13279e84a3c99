"""A plot of the loss and of a metric."""

import pathlib

from jpeft import writing
from jpeft.lazy import extra


def draw_curves(path: pathlib.Path, rows: list[dict], title: str, metric: str) -> None:
  """Draws loss and metric over updates.

  Training is a line, an evaluation a point on a line, the untuned model a level.

  Args:
    path: of the picture.
    rows: lines of metrics.jsonl.
    title: what was trained on what.
    metric: drawn beside the loss.

  Raises:
    ModuleNotFoundError: matplotlib is not installed.
  """
  with extra('quickstart'):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
  names = list(dict.fromkeys(('loss', metric)))
  figure = Figure(figsize=(4.5 * len(names), 3.4), layout='constrained')
  FigureCanvasAgg(figure)
  for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
    for split, style in (('train', '-'), ('test', 'o-')):
      points = [(row['step'], row[name]) for row in rows if row['split'] == split and name in row]
      if points:
        steps, heights = zip(*points, strict=True)
        axis.plot(steps, heights, style, label=split, markersize=4, linewidth=1.2)
    for row in rows:
      if row['split'] == 'untuned' and name in row:
        axis.axhline(row[name], color='0.5', linestyle='--', linewidth=1, label='untuned')
    axis.set(xlabel='updates', ylabel=name.replace('_', ' '))
    axis.set_xlim(0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend()
  figure.suptitle(title, fontsize=11)
  with writing.appearing(path) as part:
    figure.savefig(part, dpi=110)
