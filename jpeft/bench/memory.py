"""The memory that one training step of every method asks for: docs/memory.md and its plot.

    python -m jpeft.bench.memory [--work=w1,w2] [--methods=lst,lora]
        [--remat=none,block,dots] [--layers=scan,unroll]
                                 [--target=tpu:v5e] [--json]

Compiles whole steps (forward, backward, AdamW, state donated) ahead of time, from shapes: no
accelerator runs. A row: MiB of arguments, temporaries and total = arguments + outputs + temporaries
- aliased, and GFLOP as XLA counts them, with all rounds of loops. Frozen weights are bfloat16, what
is trained float32.

With --json the rows go to stdout. Without it they replace those of the same kind in
docs/memory.json, from which docs/memory.md and docs/memory.png are drawn, so that the table can be
made in parts.
"""

import argparse
import json
import pathlib
import sys
import time
from typing import Any

import jax
import optax

from jpeft import cli, methods, planning, programs, tasks, training
from jpeft import planning as targets
from jpeft.core import summary
from jpeft.methods import names, preset
from jpeft.models import Remat

from . import records
from .peers import PEERS
from .works import WORKS, Work

DOCS = pathlib.Path(__file__).parents[2] / 'docs'
INTRODUCTION = """
One whole step (forward, backward, AdamW, state donated) compiled ahead of time for TPU v5e by libtpu, on a machine
without a TPU; nothing was run. total = arguments + outputs + temporaries - aliased, in MiB (2**20 bytes); GFLOP as XLA
counts them, with all rounds of loops. Activations and frozen weights are bfloat16; what is trained, and Adam's state,
float32. Temporaries are those of device memory: what XLA keeps in on-chip memory does not count. What a table lacks
does not act on that work (HST reads images, BitFit biases, which T5 has none of) or was not compiled for it.

Made by `python -m jpeft.bench.memory`; hyperparameters are those of `jpeft/methods/presets.py`, else the defaults.
""".strip()
PEER_NOTE = (
  f'Rows marked "peer" are constants measured with {PEERS[0]["source"]}: the same encoder, step, target and '
  'convention.'
)
REMATS: dict[str, Remat] = {'none': False, 'block': True, 'dots': 'dots'}
FILL = {'none': 'full', 'block': 'none', 'dots': 'bottom'}
KEY = ('work', 'method', 'remat', 'layers', 'target')


def measure(
  work: str, method: str, remat: str, layers: str, where: targets.Target
) -> dict[str, Any]:
  """A row of the table.

  Args:
    work: of WORKS.
    method: of the registry, or a preset.
    remat: of REMATS.
    layers: 'scan' or 'unroll'.
    where: what to compile for.

  Raises:
    ValueError: the method does not act on the work's model.
  """
  chosen, start = WORKS[work], time.perf_counter()
  name, hyperparameters = preset(method)
  made = methods.make(name, head=chosen.head, **hyperparameters)
  planned = _planned(chosen, layers == 'scan', REMATS[remat]).stored(methods.REGISTRY[name].storage)
  tuned = planned.tuned(made)
  tx = training.optimizer(tuned, tuned.shapes, optax.constant_schedule(1e-3))
  shapes = planned.placed(
    where.mesh(), training.state_shapes(tuned, tx, planned.variables), chosen.size
  )
  fn = training.train_step(tuned, training.forward(tuned, True, planned.mode(True)), tx, 0)
  traced = jax.jit(fn, donate_argnums=0).trace(*shapes)
  facts = summary(tuned)
  row = {
    'work': work,
    'method': method,
    'remat': remat,
    'layers': layers,
    'target': where.name,
    'trainable': facts.trainable,
    'memory_class': facts.memory,
  }
  mib = lambda n: round(n / 2**20, 1)
  known = programs.nbytes(shapes)
  try:
    program = programs.compiled(traced, where.options, known)
  except programs.TooLarge as refused:
    found = {
      'arguments_mib': mib(known),
      'temp_mib': mib(refused.bytes - known),
      'total_mib': mib(refused.bytes),
      'gflop': programs.flops(traced).all,
    }
  else:
    memory, counted = programs.memory(program), (program.cost_analysis() or {}).get('flops')
    gflop = programs.flops(traced).all if counted is None else counted + programs.uncounted(traced)
    found = {
      'arguments_mib': mib(memory.argument),
      'temp_mib': mib(memory.temp),
      'total_mib': mib(memory.total),
      'gflop': gflop,
    }
  forward = planned.forward(chosen.size)
  return {
    **row,
    **found,
    'gflop': round(found['gflop'] / 1e9, 1),
    'forward_gflop': round(forward / 1e9, 1),
    'fits': where.memory is None or found['total_mib'] * 2**20 <= where.memory,
    'compile_seconds': round(time.perf_counter() - start, 1),
  }


def _planned(work: Work, scan: bool, remat: Remat) -> planning.Work:
  model, one = work.model(scan, remat), work.batch(1)
  args, kwargs = tasks.inputs(one)
  held = jax.eval_shape(model.init, jax.random.key(0), *args, **kwargs)
  return planning.Work(model, held, work.batch, work.size, training.Memory(remat=remat))


def rows(works, chosen, remats, layers, where: targets.Target, note=print):
  """The rows asked for, one after the other; what a method cannot serve is told to `note`."""
  for work in works:
    for method in chosen:
      for remat in remats:
        for kind in (k for k in WORKS[work].layers if k in layers):
          try:
            row = measure(work, method, remat, kind, where)
          except ValueError as error:
            note(f'{work}: {method} is left out: {error}')
            continue
          note(
            f'{work} {method} {remat} {kind}: {row["total_mib"]:,} MiB, {row["gflop"]:,} GFLOP '
            f'({row["compile_seconds"]} s)'
          )
          yield row


def document(found: list[dict]) -> str:
  """docs/memory.md."""
  lines = [
    '# Memory of a training step',
    '',
    INTRODUCTION,
    '',
    '![memory against FLOPs](memory.png)',
  ]
  for work in WORKS:
    here = sorted((r for r in found if r['work'] == work), key=lambda r: r['total_mib'])
    if not here:
      continue
    full = min(
      (r['total_mib'] for r in here if r['method'] == 'full' and r['remat'] == 'none'), default=None
    )
    lines += [
      '',
      f'## {work.upper()}: {WORKS[work].title}',
      '',
      '| method | remat | layers | trainable | arguments | temporaries | total MiB | saved | GFLOP |',
      '| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |',
    ]
    for r in here:
      saved = f'{100 * (1 - r["total_mib"] / full):.0f} %' if full else '-'
      lines.append(
        f'| {r["method"]} | {r["remat"]} | {r["layers"]} | {r["trainable"]:,} | {r["arguments_mib"]:,.0f} | '
        f'{r["temp_mib"]:,.0f} | **{r["total_mib"]:,.0f}** | {saved} | {r["gflop"]:,.0f} |'
      )
    if any('source' in r for r in here):
      lines += ['', PEER_NOTE]
    lines += ['', '"saved" is against our full fine-tuning without remat.']
  return '\n'.join(lines) + '\n'


def draw(found: list[dict], path: pathlib.Path) -> None:
  """Memory against FLOPs, a panel a work, the first one wide."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  works = [w for w in WORKS if any(r['work'] == w for r in found)]
  rest = [*works[1:], *['.'] * (len(works) % 2 == 0)]
  panels = [works[:1] * 2, *(rest[i : i + 2] for i in range(0, len(rest), 2))]
  figure = Figure(figsize=(12, 6 + 4 * (len(panels) - 1)), layout='constrained')
  canvas = FigureCanvasAgg(figure)
  axes = figure.subplot_mosaic(panels, height_ratios=[1.5, *[1] * (len(panels) - 1)])
  for work, axis in axes.items():
    for r in (r for r in found if r['work'] == work):
      peer = 'source' in r
      axis.plot(
        r['total_mib'],
        r['gflop'],
        '^' if peer else 'o' if r['layers'] == 'unroll' else 's',
        color='C7' if peer else 'C0',
        fillstyle=FILL[r['remat']],
        markersize=5,
      )
    axis.set_title(f'{work.upper()}: {WORKS[work].title}', fontsize=9)
    axis.set(xlabel='MiB in total', ylabel='GFLOP a step', xscale='log')
    axis.margins(x=0.12)
    axis.set_ylim(0)
    axis.grid(alpha=0.3)
  figure.suptitle(
    'hollow: blocks recomputed; half: all but products with weights; square: scanned; triangle: peer'
  )
  canvas.draw()  # places the axes, without which no label knows its neighbours
  for work, axis in axes.items():
    label(axis, [(r['method'], (r['total_mib'], r['gflop'])) for r in found if r['work'] == work])
  figure.savefig(path, dpi=110)


def label(
  axis, points: list[tuple[str, tuple[float, float]]], height: int = 10, width: int = 75
) -> None:
  """Names beside points; one that would lie on another moves up, with a line to its point."""
  taken: list[tuple[float, float]] = []
  for name, point in sorted(points, key=lambda p: p[1][::-1]):
    x, start = axis.transData.transform(point)
    y = start
    while any(abs(x - a) < width and abs(y - b) < height for a, b in taken):
      y += 2
    taken.append((x, y))
    line = {'arrowstyle': '-', 'lw': 0.4, 'color': '0.6'} if y > start + height else None
    axis.annotate(
      name,
      point,
      xytext=(5, y - start + 1),
      textcoords='offset pixels',
      fontsize=6,
      arrowprops=line,
    )


def recorded() -> list[dict]:
  """The rows of docs/memory.json, or those of the peers alone where there is none."""
  return records.recorded(DOCS / 'memory.json', PEERS)


def write(new: list[dict]) -> None:
  """Puts new rows in place of those of the same kind, and draws what is in docs/ again."""
  found = records.record(DOCS / 'memory.json', new, KEY, PEERS)
  (DOCS / 'memory.md').write_text(document(found))
  draw(found, DOCS / 'memory.png')


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    'python -m jpeft.bench.memory',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  every = names(methods.REGISTRY)
  listed = lambda known: lambda text: _listed(text, known)
  parser.add_argument('--work', type=listed(WORKS), default=list(WORKS))
  parser.add_argument('--methods', type=listed(every), default=every)
  parser.add_argument('--remat', type=listed(REMATS), default=list(REMATS))
  parser.add_argument('--layers', type=listed(('unroll', 'scan')), default=['unroll', 'scan'])
  parser.add_argument('--target', default='tpu:v5e')
  parser.add_argument('--json', action='store_true')
  flags = parser.parse_args(argv)
  with cli.inputs_checked():
    where = targets.target(flags.target)
  note = lambda text: print(text, file=sys.stderr, flush=True)
  found = rows(flags.work, flags.methods, flags.remat, flags.layers, where, note)
  if flags.json:
    print(json.dumps(list(found), indent=1))
    return 0
  for row in found:  # written at once: the table is there in part, should the rest be interrupted
    write([row])
  return 0


def _listed(text: str, known) -> list[str]:
  """The names in a text; 'w4' stands for w4_1b and w4_7b."""
  chosen = []
  for name in text.split(','):
    found = (
      [name] if name in known else [k for k in known if k.startswith(f'{name}_') and known is WORKS]
    )
    if not found:
      raise argparse.ArgumentTypeError(f'{name!r} is none of {", ".join(known)}')
    chosen += found
  return chosen


if __name__ == '__main__':
  planning.leave_accelerators()
  sys.exit(cli.command('jpeft.bench.memory', main))
