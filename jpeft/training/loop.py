"""The training loop: one linear function from a configuration to a report."""

import contextlib
import functools
import json
import pathlib
import time

import jax
import numpy as np

from jpeft import cli, data, tasks
from jpeft.core import summary
from jpeft.decoding import completions
from jpeft.quant import nbytes
from jpeft.version import __version__

from . import feature_cache as features
from . import fit, report, sharding, step
from .build import build, optimizer_of, storage_of
from .checkpoints import Checkpoints, fingerprint, save_theta
from .folder import begin, claimed
from .watch import Signals, Watch


def train(config, folder: pathlib.Path) -> dict:
  """Trains `config` in `folder`, or goes on with it; returns what report.json holds.

  Raises:
    cli.Mistake: something in config, data or files is wrong.
    cli.Stopped: a signal came; a checkpoint was written.
    cli.Diverged: a loss or gradient is not finite.
  """
  with contextlib.ExitStack() as stack:
    with cli.inputs_checked():
      stack.enter_context(claimed(folder, config))
      if (folder / 'report.json').exists():
        return json.loads((folder / 'report.json').read_text())
    return _train(config, folder, stack)


def _train(config, folder: pathlib.Path, stack: contextlib.ExitStack) -> dict:
  # ---- Data, backbone, method, optimizer.
  with cli.inputs_checked():
    mesh, task = sharding.mesh(config.mesh.data, config.mesh.model), tasks.of(config)
    source, test = (task.source(config, split) for split in (config.data.train, config.data.test))
    size, eval_size = config.data.batch_size, config.data.eval_batch_size or config.data.batch_size
    pretrained, tuned = build(config, len(source.classes))
    task.check(config, tuned)
    blank = task.blank(config, pretrained)
    learn, judge = (
      features.Part(
        *task.rows(config, pretrained, examples, training), step.forward(tuned, training), blank
      )
      for examples, training in ((source, True), (test, False))
    )
    raw, about = judge, getattr(learn.source, 'about', None)
    if config.data.cache_features:
      learn, judge = (features.cached(part, tuned, eval_size) for part in (learn, judge))
    batches = data.Batches(learn.source, size, learn.transform, config.seed)
    steps = config.steps or max(1, round(config.epochs * batches.steps_per_epoch))
    rate, tx = optimizer_of(config, tuned, steps)
    facts = summary(tuned)

  # ---- Compilation, from shapes: what cannot fit is told before anything is put on a device.
  whole, rows = sharding.replicated(mesh), sharding.over_data(mesh)
  split = (
    sharding.over_model(mesh, pretrained.variables) if config.mesh.backbone == 'sharded' else whole
  )
  offload = sharding.offloads(mesh, config.optimizer.offload)
  fn = step.train_step(
    tuned,
    learn.forward,
    tx,
    config.seed,
    config.loss.label_smoothing,
    config.optimizer.accumulate,
    offload,
  )
  shapes = step.state_shapes(tuned, tx, pretrained.variables)
  placed = sharding.of_state(mesh, shapes, offload)
  shapes = sharding.laid(shapes, placed)
  held = sharding.laid(pretrained.variables, split)
  with cli.inputs_checked():
    update, cost = fit.fitting(fn, shapes, held, step.rows_of(learn.blank, size, rows))

  def marker(part, theta):
    marked = step.rows_of(part.blank | {'mask': np.ones(1, np.float32)}, eval_size, rows)
    return fit.compiled(step.eval_step(part.forward, task.tally), theta, held, marked)[0]

  mark = marker(judge, shapes['theta'])

  # ---- Arrays on their devices.
  backbone = jax.device_put(pretrained.variables, split)
  backbone_sha256 = fingerprint(backbone)
  state = jax.device_put(step.initial_state(tuned, tx, backbone, config.seed), placed)

  # ---- Where the run stands.
  with cli.inputs_checked():
    begin(
      folder,
      config,
      labels=source.classes,
      reads='image' if pretrained.preprocess else 'text',
      backbone_sha256=backbone_sha256,
      files=pretrained.files,
      jpeft=__version__,
    )
    checkpoints = Checkpoints(folder / 'checkpoints', config.checkpoint.keep)
    stack.callback(checkpoints.close)
    start, before = checkpoints.latest or 0, 0.0
    if start:
      state, kept = checkpoints.restore(state)
      before = kept['seconds']
      batches.restore(kept['data'])
    metrics = report.Metrics(folder / 'metrics.jsonl', start, config.log.tensorboard)
    stack.callback(metrics.close)
  progress = report.Progress(steps, start)
  progress.note(
    f'{config.method.name} on {config.model.source}, {config.data.name}: {facts.trainable:,} '
    f'trainable numbers beside {facts.total:,}, {facts.memory}; {steps} updates of {size}'
    + (f', going on after {start}' if start else '')
  )
  progress.note(report.asks(cost))
  if about:
    progress.note(about)
  signals = stack.enter_context(Signals())

  def scored(tuned, theta, mark, part, writes):
    """What a model scores on the test split, with what it writes if that is asked for; None after a
    signal.
    """
    stop = lambda: signals.caught
    scores = step.evaluate(mark, task.scores, theta, backbone, part.once(eval_size), rows, stop)
    if scores is None or not writes:
      return scores
    write = functools.partial(completions, tuned, backbone, theta=theta)
    written = task.written(config, pretrained, test, write, stop)
    return None if written is None else scores | written

  if task.untuned and not metrics.has(0, 'untuned') and not start:
    bare = tuned.only()
    plain = raw._replace(forward=step.forward(bare, False))
    if scores := scored(bare, {}, marker(plain, {}), plain, writes=True):
      metrics.add(0, 'untuned', **scores)
      progress.note(report.line('untuned', scores))

  # ---- The loop. With `number` updates made: evaluate, save, and make one more.
  number, began = start, time.perf_counter()
  seconds = lambda: before + time.perf_counter() - began
  watch = Watch(config.data.train, checkpoints)
  for part in (learn, judge):
    if isinstance(part.source, features.Features) and not signals.caught:
      progress.note(
        f'features of {len(part.source)} examples: {part.source.nbytes / 2**20:.0f} MiB'
      )
      part.source.fill(
        backbone, lambda batch: jax.device_put(batch, rows), stop=lambda: signals.caught
      )
  while True:
    due = lambda every: number == steps or bool(every and number and number % every == 0)
    if signals.caught or due(config.eval.every) or due(config.checkpoint.every):
      watch.catch_up()
    if due(config.eval.every) and not metrics.has(number, 'test'):
      scores = scored(tuned, state['theta'], mark, judge, writes=number == steps)
      if scores is not None:
        if tasks.better(config.eval.metric, scores, metrics.of('test')):
          save_theta(folder / 'best.safetensors', state['theta'], step=number, **scores)
        metrics.add(number, 'test', **scores)
        progress.note(report.line(f'step {number}', scores))
    if signals.caught or number == steps:
      break
    if due(config.checkpoint.every) and number > start:
      checkpoints.save(number, state, {'data': batches.state(), 'seconds': seconds()})

    with cli.inputs_checked():
      batch = next(batches)
    indices = batch.pop('index')
    state, out = update(state, backbone, jax.device_put(batch, rows))
    number += 1
    watch.see(number, indices, out)
    if number % config.log.every == 0 or number == steps:
      watch.catch_up()
      metrics.add(
        number,
        'train',
        **step.means(state['sums']),
        lr=float(rate(number - 1)),
        grad_norm=float(out['grad_norm']),
      )
      state['sums'] = jax.device_put(step.no_sums(), whole)
    progress.show(number, loss=watch.loss)

  checkpoints.save(number, state, {'data': batches.state(), 'seconds': seconds()})
  checkpoints.wait()
  if not metrics.has(steps, 'test'):
    raise cli.Stopped(
      signals.caught, f'checkpoint {number} of {steps} is in {folder}; the same command goes on'
    )

  # ---- What comes out.
  if fingerprint(backbone) != backbone_sha256:
    raise RuntimeError('training has changed the backbone')
  save_theta(folder / 'theta.safetensors', state['theta'], step=number)
  best = tasks.best(config.eval.metric, metrics.of('test'))
  told = {
    'method': config.method.name,
    'model': config.model.source,
    'data': config.data.name,
    'trainable': facts.trainable,
    'total': facts.total,
    'memory': facts.memory,
    'mergeable': facts.mergeable,
    'eval': report.values(metrics.of('test')[-1]),
    **{row['split']: report.values(row) for row in metrics.of('untuned')},
    'best': {'step': best['step'], 'metric': config.eval.metric, 'value': best[config.eval.metric]},
    'storage': storage_of(config),
    'backbone_bytes': nbytes(backbone),
    'steps': steps,
    'batch_size': size,
    'seconds': round(seconds(), 2),
    'step_cost': cost,
    'device': f'{mesh.size} x {mesh.devices.flat[0].device_kind}',
    'backbone_sha256': backbone_sha256,
    'theta_sha256': fingerprint(state['theta']),
  }
  report.write_report(folder, told, metrics.rows)
  progress.note(report.line(folder, told['eval']))
  return told
