"""A plot of loss and accuracy."""

import pathlib


def draw_curves(path: pathlib.Path, rows: list[dict]) -> bool:
  """Draws loss and accuracy over updates; returns False if matplotlib is not installed.

  Args:
    path: of the picture.
    rows: lines of metrics.jsonl.
  """
  try:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
  except ImportError:
    return False
  figure = Figure(figsize=(9, 3.2), layout='constrained')
  FigureCanvasAgg(figure)
  for axis, name in zip(figure.subplots(1, 2), ('loss', 'accuracy'), strict=True):
    for split, style in (('train', '-'), ('test', 'o-')):
      points = [(row['step'], row[name]) for row in rows if row['split'] == split]
      if points:
        steps, heights = zip(*points, strict=True)
        axis.plot(steps, heights, style, label=split, markersize=4)
    axis.set(xlabel='update', ylabel=name)
    axis.grid(alpha=0.3)
    axis.legend()
  figure.savefig(path, dpi=110)
  return True
