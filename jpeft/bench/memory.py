"""The memory that one training step of every method needs: docs/memory.md and its plot.

    python -m jpeft.bench.memory [--work=w1,w2] [--methods=lst,lora]
        [--remat=none,block,dots] [--layers=scan,unroll]
                                 [--target=tpu:v5e] [--json]

Compiles whole steps (forward, backward, AdamW, state donated) ahead of time, from shapes: no
accelerator runs. A row: MiB of arguments, temporaries and total = arguments + outputs + temporaries
- aliased, GFLOP as XLA counts them, the compiler's estimate of cycles, and MiB moved to and from the
device's memory, all with all rounds of loops. Frozen weights are bfloat16, what is trained float32.

With --json the rows go to stdout. Without it they replace those of the same kind in
docs/memory.json, from which docs/memory.md and docs/memory.png are drawn, so that the table can be
made in parts.
"""

import argparse
import functools
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import optax

from jpeft import cli, methods, planning, programs, tasks, training, writing
from jpeft.core import Tuned, chain, summary
from jpeft.lazy import extra
from jpeft.models import Remat

from . import records
from .peers import PEERS
from .pictures import compared
from .works import WORKS, Work

DOCS = pathlib.Path(__file__).parents[2] / 'docs'
INTRODUCTION = """
One whole step (forward, backward, AdamW, state donated) compiled ahead of time for TPU v5e by libtpu, on a machine
without a TPU; nothing was run. total = arguments + outputs + temporaries - aliased, in MiB (2**20 bytes); GFLOP as XLA
counts them. Mcycles are the compiler's own estimate of what it runs, in millions (a model of the chip: to be compared
within a table, not to be read as a speed; "+ n" are calls of kernels written by hand, of which it has none), and moved
the MiB that are read from device memory and written to it; both by the text of the compiled program
(`jpeft/programs/schedule.py`). GFLOP, Mcycles and moved have all rounds of loops; a dash is a row that was compiled before
these were counted, or a program that the compiler refused or cannot print.
Activations and frozen weights are bfloat16; what is trained, and Adam's state,
float32. Temporaries are those of device memory: what XLA keeps in on-chip memory does not count. What a table lacks
does not act on that work (HST reads images, BitFit biases, which T5 has none of) or was not compiled for it. A row that
names a target was compiled for it, since what it needs is more than a v5e has. What a pass over examples chooses (SCT,
SPT) is taken as a plan takes it, as many numbers at places that nobody chose.

Made by `python -m jpeft.bench.memory`; hyperparameters are those of `jpeft/methods/presets.py`, else the defaults.
""".strip()
PICTURE = """
![memory and FLOPs of a step, by memory class](memory.png)

The picture has W1 without remat, each method in the layout that needs less, and at most fifteen methods.
""".strip()
PEER_NOTE = (
  f'Rows marked "peer" are constants measured with {PEERS[0]["source"]}: the same encoder, step, '
  'target and convention.'
)
REMATS: dict[str, Remat] = {
  'none': False,
  'block': True,
  'dots': 'dots',
  'packed': 'packed',
  'packed4': 'packed4',
}
USUAL = 'tpu:v5e'
KEY = ('work', 'method', 'remat', 'layers', 'target')
_HEAD = """
| method | remat | layers | trainable | arguments | temporaries | total MiB | saved | GFLOP | Mcycles | moved MiB |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
""".strip()


def measure(
  work: str, method: str, remat: str, layers: str, where: planning.Target
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
  start = time.perf_counter()
  planned, tuned = with_method(WORKS[work], method, layers == 'scan', REMATS[remat])
  facts = summary(tuned)
  costs = _costs(planned, tuned, where)
  forward = planned.forward(planned.size)
  return {
    'work': work,
    'method': method,
    'remat': remat,
    'layers': layers,
    'target': where.name,
    'trainable': facts.trainable,
    'memory_class': facts.memory,
    **costs,
    'forward_gflop': round(forward / 1e9, 1),
    'fits': where.memory is None or costs['total_mib'] * 2**20 <= where.memory,
    'compile_seconds': round(time.perf_counter() - start, 1),
  }


def with_method(work: Work, method: str, scan: bool, remat: Remat) -> tuple[planning.Work, Tuned]:
  """(a work with its kernels as they are stored, a preset attached to its model)."""
  name, hyperparameters = methods.preset(method)
  storage = work.storage or methods.REGISTRY[name].storage
  planned = planned_work(work, scan, remat).stored(storage)
  made = methods.make(name, head=work.head, **hyperparameters)
  if work.mlp_tokens is not None:
    made = chain(made, methods.tiled(work.mlp_tokens))
  return planned, planned.tuned(made)


def _costs(planned: planning.Work, tuned, where: planning.Target) -> dict[str, float | None]:
  """MiB, GFLOP and time of a training step, which is compiled and not run."""
  traced, arguments = traced_step(planned, tuned, where)
  try:
    program = programs.compiled(traced, where.options, arguments)
  except programs.TooLarge as refused:
    # Of a program that does not fit the compiler reports the total alone.
    temp = refused.bytes - arguments
    total = refused.bytes
    flops = programs.flops(traced).all
    found = None
  else:
    memory = programs.memory(program)
    arguments = memory.argument
    temp = memory.temp
    total = memory.total
    flops = _flops(program, traced)
    found = programs.schedule(program)
  return {
    'arguments_mib': mib(arguments),
    'temp_mib': mib(temp),
    'total_mib': mib(total),
    'gflop': round(flops / 1e9, 1),
    **planning.timing.entries(found),
  }


def traced_step(
  planned: planning.Work, tuned, where: planning.Target
) -> tuple[jax.stages.Traced, int]:
  """(a training step with AdamW, traced for a target; bytes of its arguments)."""
  tx = adamw(tuned)
  mesh = where.mesh()
  state = training.state_shapes(tuned, tx, planned.variables)
  shapes = planned.placed(tuned, mesh, state, planned.size)
  step = planned.step(tuned, tx, mesh)
  return jax.jit(step, donate_argnums=0).trace(*shapes), programs.nbytes(shapes)


def adamw(tuned: Tuned) -> optax.GradientTransformation:
  """The optimizer of the steps that are compared."""
  return training.optimizer(tuned, tuned.shapes, optax.constant_schedule(1e-3))


def _flops(program, traced) -> float:
  """What the compiler counts, with what it cannot see; else what the traced program has."""
  counted = (program.cost_analysis() or {}).get('flops')
  if counted is None:
    return programs.flops(traced).all
  return counted + programs.uncounted(traced)


def mib(size: int) -> float:
  """Bytes in MiB."""
  return round(size / 2**20, 1)


def planned_work(work: Work, scan: bool, remat: Remat) -> planning.Work:
  """A work with its model and the shapes of its backbone."""
  model = work.model(scan, remat)
  args, kwargs = tasks.inputs(work.batch(1))
  backbone = jax.eval_shape(model.init, jax.random.key(0), *args, **kwargs)
  memory = training.Memory(remat=remat)
  return planning.Work(model, backbone, work.batch, work.size, memory, objective=work.objective)


def rows(
  works, chosen, remats, layers, where: planning.Target, note=print
) -> Iterator[dict[str, Any]]:
  """The rows asked for, one after the other; `note` gets a line of each, or why it is left out."""
  for work, method, remat in itertools.product(works, chosen, remats):
    for kind in WORKS[work].layers:
      if kind not in layers:
        continue
      try:
        row = measure(work, method, remat, kind, where)
      except ValueError as error:
        note(f'{work}: {method} is left out: {error}')
        continue
      mcycles, moved = planning.timing.cells(row)
      note(
        f'{work} {method} {remat} {kind}: {row["total_mib"]:,} MiB, {row["gflop"]:,} GFLOP, '
        f'{mcycles} Mcycles, {moved} MiB moved ({row["compile_seconds"]} s)'
      )
      yield row


def document(found: list[dict]) -> str:
  """The text of docs/memory.md."""
  parts = ['# Memory of a training step', INTRODUCTION, PICTURE]
  for work in WORKS:
    here = [row for row in found if row['work'] == work]
    if here:
      parts += _section(work, sorted(here, key=lambda row: row['total_mib']))
  return '\n\n'.join(parts) + '\n'


def _section(work: str, here: list[dict]) -> list[str]:
  """The paragraphs of a work, from its rows."""
  full = [row['total_mib'] for row in here if row['method'] == 'full' and row['remat'] == 'none']
  table = [_HEAD]
  for row in here:
    saved = '-'
    if full:
      saved = f'{100 * (1 - row["total_mib"] / min(full)):.0f} %'
    method = row['method']
    if row['target'] != USUAL:
      method += f' ({row["target"]})'
    table.append(
      f'| {method} | {row["remat"]} | {row["layers"]} | {row["trainable"]:,} | '
      f'{row["arguments_mib"]:,.0f} | {row["temp_mib"]:,.0f} | **{row["total_mib"]:,.0f}** | '
      f'{saved} | {row["gflop"]:,.0f} | {" | ".join(planning.timing.cells(row))} |'
    )
  paragraphs = [f'## {work.upper()}: {WORKS[work].title}', '\n'.join(table)]
  if any('source' in row for row in here):
    paragraphs.append(PEER_NOTE)
  paragraphs.append('"saved" is against our full fine-tuning without remat.')
  return paragraphs


def draw(found: list[dict], path: pathlib.Path) -> None:
  """Plots memory and FLOPs of the first work, a line a method, the one that needs least first.

  Rows are without remat, each in the layout that needs less.
  """
  work = next(name for name in WORKS if any(row['work'] == name for row in found))
  least: dict[str, dict] = {}
  for row in found:
    is_drawn = row['work'] == work and row['remat'] == 'none' and 'memory_class' in row
    if is_drawn and row['total_mib'] <= least.get(row['method'], row)['total_mib']:
      least[row['method']] = row
  drawn = sorted(compared(list(least.values())), key=lambda row: -row['total_mib'])
  figure = planning.drawing.figure(8.5, 1.9 + 0.27 * len(drawn))
  mib, gflop = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
  for place, row in enumerate(drawn):
    style = planning.drawing.style(row['memory_class'])
    mib.plot(row['total_mib'], place, **style)
    mib.annotate(
      f'{row["total_mib"]:,.0f}',
      (row['total_mib'], place),
      xytext=(7, 0),
      textcoords='offset points',
      va='center',
      fontsize=8,
    )
    gflop.plot(row['gflop'], place, **style)
  planning.drawing.logarithmic(mib)
  mib.margins(x=0.15)
  mib.set_yticks(range(len(drawn)), [row['method'] for row in drawn])
  mib.set(xlabel='MiB in total')
  gflop.set(xlabel='GFLOP')
  gflop.margins(x=0.08)
  gflop.set_xlim(0)
  gflop.xaxis.set_major_formatter('{x:,.0f}')
  for axis in (mib, gflop):
    axis.grid(alpha=0.3)
  figure.suptitle(f'A training step on {WORKS[work].title}', fontsize=11)
  planning.drawing.legend(figure, (row['memory_class'] for row in drawn))
  with writing.appearing(path) as part:
    figure.savefig(part, dpi=110)


def recorded() -> list[dict]:
  """The rows of docs/memory.json, or those of the peers alone where there is none."""
  return records.recorded(DOCS / 'memory.json', PEERS)


def write(new: list[dict]) -> None:
  """Replaces rows in docs/ by new ones of the same key, and writes its page and plot again."""
  found = records.record(DOCS / 'memory.json', new, KEY, PEERS)
  writing.write(DOCS / 'memory.md', document(found))
  draw(found, DOCS / 'memory.png')


def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    'python -m jpeft.bench.memory',
    description=cli.described(__doc__),
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  choices = {
    '--work': WORKS,
    '--methods': methods.names(methods.REGISTRY),
    '--remat': REMATS,
    '--layers': ('unroll', 'scan'),
  }
  for flag, known in choices.items():
    parser.add_argument(flag, type=functools.partial(_listed, known=known), default=list(known))
  parser.add_argument('--target', default=USUAL)
  parser.add_argument('--json', action='store_true')
  flags = parser.parse_args(argv)
  with cli.inputs_checked():
    if not flags.json:
      _check_docs()
    where = planning.target(flags.target)
  note = functools.partial(print, file=sys.stderr, flush=True)
  found = rows(flags.work, flags.methods, flags.remat, flags.layers, where, note)
  if flags.json:
    print(json.dumps(list(found), indent=1))
    return 0
  for row in found:
    write([row])  # after each row: a table in part, should the rest be interrupted
  return 0


def _check_docs() -> None:
  """Raises an error, before anything is compiled, if page and plot cannot be written."""
  if not DOCS.is_dir():
    raise FileNotFoundError(f'there is no folder {DOCS} of a clone to write to: give --json')
  with extra('plan'):
    import matplotlib  # noqa: F401


def _listed(text: str, known: Iterable[str]) -> list[str]:
  """The names in a text; 'w4' stands for all works w4_...

  Raises:
    argparse.ArgumentTypeError: an unknown name.
  """
  chosen = []
  for name in text.split(','):
    found = [other for other in known if other == name]
    if not found and known is WORKS:
      found = [work for work in WORKS if work.startswith(f'{name}_')]
    if not found:
      raise argparse.ArgumentTypeError(f'{name!r} is none of {", ".join(known)}')
    chosen += found
  return chosen


if __name__ == '__main__':
  planning.leave_accelerators()
  sys.exit(cli.command('jpeft.bench.memory', main))
