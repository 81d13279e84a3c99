"""The training loop: one linear function from a configuration to a report."""

import contextlib
import functools
import json
import pathlib
import time
from collections.abc import Callable, Sequence

import numpy as np

from jpeft import cli, quant, tasks
from jpeft import config as config_lib
from jpeft.core import noting, summary
from jpeft.decoding import AT_ONCE, completions
from jpeft.programs import mib
from jpeft.quant import nbytes
from jpeft.version import __version__
from jpeft.writing import remove_parts

from . import elastic, feature_cache, fit, hosts, report, sharding, shared, step
from .build import build, check_used, optimizer_of
from .by_label import write_by_label
from .checkpoints import damaged, fingerprint
from .confusion import write_confusion
from .endings import saved_first
from .examples import count_of, digests, restore_skipped, skipped_of
from .feature_cache import Features, Part
from .folder import begin, claimed
from .imports import imports_of
from .layout import Layout
from .memory import Memory
from .metrics import Metrics, values
from .progress import Progress, counted
from .stages import current, entered, stages_of
from .start import start_of
from .watch import Signals, Watch
from .writers import Writers, check_trackers, trackers_of


def train(config, folder: pathlib.Path, allow: Sequence[str] = ()) -> dict:
  """Trains `config` in `folder`, or goes on with it; returns the values of report.json.

  Args:
    config: complete.
    folder: of the run.
    allow: what may differ from the run that `folder` holds, see `elastic.MAY_CHANGE`.

  Raises:
    cli.Mistake: something in config, data or files is wrong.
    cli.Stopped: a signal came; a checkpoint was written.
    cli.Diverged: a loss or gradient is not finite.
  """
  with contextlib.ExitStack() as stack:
    hosts.check_config(config)
    changes: dict = {}
    done = None
    with hosts.together():
      if hosts.first():
        changes = stack.enter_context(claimed(folder, config, allow))
        remove_parts(folder)
        if not elastic.is_longer(changes):
          done = report.finished(folder, Progress().note)
    changes, done = hosts.told([changes, done])
    if done is not None:
      return done
    folder = stack.enter_context(shared.mirrored(folder))
    return _train(config, folder, changes, stack)


def _train(config, folder: pathlib.Path, changes: dict, stack: contextlib.ExitStack) -> dict:
  # ---- Data, backbone, method, optimizer.
  progress = Progress(stack.enter_context(shared.console()))
  stack.callback(progress.close)
  skipped = skipped_of(config, progress.note)
  with hosts.together():
    trackers = trackers_of(config) if hosts.first() else ()
    check_trackers(trackers)
    mesh = sharding.mesh(config.mesh.data, config.mesh.model)
    hosts.check_mesh(mesh)
    hosts.check_supported(config)
    rows = sharding.over_data(mesh)
    task = tasks.of(config)
    train_source = task.source(config, config.data.train)
    eval_source = task.source(config, config.data.test)
    facts_of_labels = task.facts(config, train_source)
    outputs = task.outputs(train_source.classes)
    objective = task.objective(config, facts_of_labels)
    pretrained, tuned = build(config, outputs)
    task.check(config, tuned)
    memory = Memory.of(config)
    layout = Layout(tuned, mesh, config.mesh.backbone, config.mesh.whole_below)

    def part_of(source, training: bool) -> Part:
      rows, transform = task.rows(config, pretrained, source, training, facts_of_labels)
      forward = layout.forward(tuned, training)
      example = task.example(config, pretrained, outputs)
      return Part(rows, transform, forward, example, skipped.get('train' if training else 'test'))

    train_rows = hosts.Rows(rows, config.data.batch_size)
    eval_rows = hosts.Rows(rows, config.data.eval_batch_size or train_rows.size)
    train_part = part_of(train_source, True)
    eval_part = part_of(eval_source, False)
    untuned_part = eval_part  # the untuned model reads raw examples, not features
    scored = eval_part.source
    source_info = [
      f'{split}: {part.source.about}'
      for split, part in ((config.data.train, train_part), (config.data.test, eval_part))
      if getattr(part.source, 'about', '')
    ]
    if memory.cached_features:
      train_part = feature_cache.cached(train_part, tuned)
      eval_part = feature_cache.cached(eval_part, tuned)
    batches = train_part.shuffled(train_rows, config.seed)
    steps = config.steps or max(1, round(config.epochs * batches.steps_per_epoch))
    elastic.check_length(folder, steps)
    stages = stages_of(tuned, steps, lambda staged: optimizer_of(config, staged, steps))
    if memory.cached_features and len(stages) > 1:
      raise ValueError(
        f'config.data.cache_features: {config.method.name} trains other entries from an update on, '
        'and features are of what is frozen in all of a run; leave it out'
      )
    facts = summary(stages[0].tuned)
    check_used(config, tuned)
    other_run = start_of(config, tuned, folder)

  # ---- Compilation, from shapes: an update that cannot fit is refused before anything is put on a
  # device.
  progress.stage('compiling')
  offload = sharding.offloads(mesh, memory.offload)
  backbone_sharding = layout.of_backbone(pretrained.variables)
  backbone_shapes = sharding.with_sharding(pretrained.variables, backbone_sharding)
  batch_shapes = step.batch_shapes(train_part.example, train_rows.size, rows)
  for stage in stages:
    forward = train_part.forward
    if stage.tuned is not tuned:
      forward = layout.forward(stage.tuned, True)
    train_step = step.train_step(
      stage.tuned,
      forward,
      stage.tx,
      config.seed,
      objective,
      config.optimizer.accumulate,
      offload,
    )
    state_shapes = step.state_shapes(stage.tuned, stage.tx, pretrained.variables)
    stage.sharding = layout.of_state(state_shapes, offload)
    state_shapes = sharding.with_sharding(state_shapes, stage.sharding)
    stage.shapes = state_shapes
    with hosts.together(), noting() as products:
      stage.update, stage.cost = fit.fitting(
        train_step, state_shapes, backbone_shapes, batch_shapes
      )

  def compiled_eval(part: Part, theta_shapes):
    example = part.example | {'mask': np.ones(1, np.float32)}
    shapes = step.batch_shapes(example, eval_rows.size, rows)
    fn = step.eval_step(part.forward, task.tally, task.tally_losses)
    return fit.compiled(fn, theta_shapes, backbone_shapes, shapes)[0]

  eval_step = compiled_eval(eval_part, state_shapes['theta'])

  # ---- Arrays on their devices.
  backbone_sha256 = fingerprint(pretrained.variables)
  hosts.check_equal(f'the SHA-256 of the backbone {config.model.source}', backbone_sha256)
  if other_run is not None:
    hosts.check_equal(f'the SHA-256 of {config.method.start}', other_run.sha256)
  backbone = hosts.placed(pretrained.variables, backbone_sharding)
  backbone_held = hosts.held(backbone, backbone_sha256)

  # ---- The folder, and where the run was when it stopped.
  reads = tasks.modality_of(pretrained).name
  with hosts.together():
    sources = {'train': train_source, 'test': eval_source}
    found_data = digests(folder, sources, config.data.on_error)
  hosts.check_equal('what the splits hold', json.dumps(found_data))
  with hosts.together():
    told_changes = begin(
      folder,
      config,
      changes,
      data=found_data,
      processes=hosts.count(),
      labels=train_source.classes,
      facts=facts_of_labels,
      reads=reads,
      imports=imports_of(config, reads),
      backbone_sha256=backbone_sha256,
      files=pretrained.files,
      start_sha256=None if other_run is None else other_run.sha256,
      jpeft=__version__,
    )
  checkpoints = shared.Checkpoints(folder / 'checkpoints', config.checkpoint.keep)
  stack.callback(checkpoints.close)
  start = 0
  seconds_before = 0.0
  found = checkpoints.newest(lambda number: current(stages, number).shapes, progress.note)
  if found is None:
    with hosts.together():
      if other_run is not None and not other_run.arrays:  # they were left to a checkpoint
        other_run = start_of(config, tuned, folder)
    put_start = None if other_run is None else other_run.put
    begun = functools.partial(
      step.initial_state,
      stages[0].tuned,
      stages[0].tx,
      seed=config.seed,
      start=put_start,
      shardings=stages[0].sharding,
    )
    with cli.inputs_checked():
      state = hosts.computed(begun, stages[0].sharding, backbone)
  with hosts.together():
    if found is not None:
      start, state, kept = found
      seconds_before = kept['seconds']
      batches.restore(kept['data'])
      restore_skipped(skipped, kept.get('skipped', {}))
    stage = current(stages, start)
    metrics = Metrics(folder / 'metrics.jsonl', start)

  progress.note(report.begun(config, facts, steps, start))
  if other_run is not None and other_run.arrays:
    progress.note(other_run.told)
  progress.note(report.needs(stage.cost))
  for told in layout.exceptions():
    progress.note(f'mesh.backbone={config.mesh.backbone}: {told}')
  kernels = quant.told(tuned.sites, products, mesh)
  if kernels:
    progress.note(kernels)
  if isinstance(train_part.forward, step.Forward):
    _, why = train_part.forward.in_pieces(batch_shapes, objective)
    if why:
      progress.note(f'logits are made whole: {why}')
  for later in stages:
    if later.begin > start:
      count = summary(later.tuned).trainable
      progress.note(f'after {later.begin} updates: {count:,} trainable numbers')
  for change in told_changes:
    progress.note(elastic.line(change))
  for about in source_info:
    progress.note(about)
  with hosts.together():
    writers = Writers(trackers, folder, start, metrics.rows, progress.note)
    stack.callback(writers.close)
  if not start:
    writers.config(config_lib.flatten(config))
  metrics.copied_to(writers)
  stop = hosts.Stop(stack.enter_context(Signals()), mesh)

  # ---- Evaluation, with `number` updates made.
  number = start

  def is_last(*newest: dict[str, float]) -> bool:
    """Whether no update follows: all are made, or evaluations have got no better for too long.

    Args:
      newest: scores of an evaluation that is not yet in metrics.jsonl.
    """
    if number == steps:
      return True
    if config.eval.patience is None:
      return False
    scored = [*metrics.of('test'), *newest]
    return tasks.stale(config.eval.metric, scored) >= config.eval.patience

  def always(scores: dict[str, float]) -> bool:
    """That texts are written, whatever the scores are."""
    return True

  def evaluated(model, theta, eval_step, part: Part, writes: Callable[[dict], bool]):
    """Scores of a model on the test split, and of its texts if writes(scores); None if stopped."""
    count = progress.stage('evaluating', len(part.source))
    batches = counted(stop.guarded(part.once(eval_rows)), eval_rows.size, count)
    tally = step.evaluate(eval_step, theta, backbone, batches, eval_rows, stop, task.kept)
    if tally is None:
      return None
    tally = task.judged(config, tally, scored)
    if 'confusion' in tally:
      write_confusion(folder, number, train_source.classes, tally['confusion'])
    by_label = task.by_label(tally, train_source.classes, facts_of_labels)
    if by_label:
      write_by_label(folder, number, by_label)
    scores = task.scores(tally, tasks.requested(config), facts_of_labels)
    if not writes(scores):
      return scores

    def write(prompts, **options):
      """What the model writes after each prompt, counted by batches."""
      progress.stage('writing')  # on a terminal, while the first batch is written
      count = progress.stage('writing', len(prompts))
      texts = completions(model, backbone, prompts, theta=theta, **options)
      for number, text in enumerate(texts, 1):
        if number % AT_ONCE == 0 or number == len(prompts):
          count.show(number)
        yield text

    written = task.written(config, pretrained, eval_source, write, stop)
    if written is None:
      return None
    return scores | written

  if task.untuned and not start and not metrics.has(0, 'untuned'):
    untuned = tuned.only()
    part = untuned_part._replace(forward=layout.forward(untuned, False))
    scores = evaluated(untuned, {}, compiled_eval(part, {}), part, writes=always)
    if scores is not None:
      metrics.add(0, 'untuned', **scores)
      progress.note(report.line('untuned', scores))

  # ---- Features of the backbone, once an example.
  began = time.perf_counter()

  def seconds() -> float:
    return seconds_before + time.perf_counter() - began

  unfilled = [part.source for part in (train_part, eval_part) if isinstance(part.source, Features)]
  if unfilled:
    examples = sum(map(len, unfilled))
    size = sum(features.nbytes for features in unfilled)
    progress.note(f'features of {examples:,} examples: {mib(size)}')
    filling = progress.stage('features', examples)
    for features in unfilled:
      features.fill(backbone, eval_rows, stop, filling.add)

  # ---- The loop: evaluate, save, and make one more update.
  watch = Watch(config.data.train, checkpoints)
  updates = progress.stage('update', steps, start)
  evaluate_every = config.eval.every or batches.steps_per_epoch

  def save_checkpoint():
    about = {'data': batches.state(), 'seconds': seconds()}
    about['skipped'] = {role: found.state() for role, found in skipped.items()}
    checkpoints.save(number, state, about)

  def reading():
    """Where examples are read: a broken one ends the run after a checkpoint."""
    store = watch.check, save_checkpoint, checkpoints.wait
    return saved_first(folder, *store, skips=bool(skipped) or hosts.several())

  def is_due(every: int) -> bool:
    return number == steps or (number > 0 and number % every == 0)

  with hosts.together():
    if start < steps:
      batches.check(0)
  while True:
    if number + 2 <= steps:
      stop.look_ahead(functools.partial(batches.check, 1))
    # A state that is not finite is neither evaluated nor saved.
    if stop() or is_due(evaluate_every) or is_due(config.checkpoint.every):
      watch.check()
    if is_due(evaluate_every) and not metrics.has(number, 'test'):
      with reading():
        scores = evaluated(tuned, state['theta'], eval_step, eval_part, writes=is_last)
      if scores is not None:
        if tasks.better(config.eval.metric, scores, metrics.of('test')):
          best_file = folder / 'best.safetensors'
          shared.save_theta(best_file, state['theta'], step=number, **scores)
        metrics.add(number, 'test', **scores, **count_of(skipped, 'test'))
        progress.note(report.line(f'step {number}', scores))
    if stop.caught or is_last():
      break
    if is_due(config.checkpoint.every) and number > start:
      save_checkpoint()

    with reading(), cli.inputs_checked():
      batch = next(batches)
    indices = batch.pop('index')
    state, out = stage.update(state, backbone, train_rows.put(batch))
    number += 1
    watch.add(number, indices, out)
    following = current(stages, number)
    if following is not stage:
      stage = following
      state = entered(stage, state)
    if number % config.log.every == 0 or number == steps:
      watch.check()
      metrics.add(
        number,
        'train',
        **step.means(state['sums'], objective),
        lr=float(stage.rate(number - 1)),
        grad_norm=float(out['grad_norm']),
        **count_of(skipped, 'train'),
      )
      state['sums'] = hosts.placed(step.zero_sums(), sharding.replicated(mesh))
    updates.show(number, loss=watch.loss)

  save_checkpoint()
  checkpoints.wait()
  with reading():
    stop.raise_failure()
  if not is_last() or not metrics.has(number, 'test'):
    raise cli.Stopped(
      stop.caught, f'checkpoint {number} of {steps} is in {folder}; the same command goes on'
    )

  if number < steps:
    progress.note(
      f'no better {config.eval.metric} in {config.eval.patience} evaluations: ended after {number} '
      f'of {steps} updates'
    )

  # ---- The report.
  if hosts.held(backbone) != backbone_held:
    raise RuntimeError('training has changed the backbone')
  shared.save_theta(folder / 'theta.safetensors', state['theta'], step=number)
  best = tasks.best(config.eval.metric, metrics.of('test'))
  result = {
    'method': config.method.name,
    'model': config.model.source,
    'data': config.data.name,
    'trainable': facts.trainable,
    'total': facts.total,
    'memory': facts.memory,
    'mergeable': facts.mergeable,
    'eval': values(metrics.of('test')[-1]),
    **{row['split']: values(row) for row in metrics.of('untuned')},
    'best': {'step': best['step'], 'metric': config.eval.metric, 'value': best[config.eval.metric]},
    'storage': memory.storage,
    'backbone_bytes': nbytes(backbone),
    'steps': number,
    'batch_size': train_rows.size,
    'seconds': round(seconds(), 2),
    'step_cost': max((one.cost for one in stages), key=lambda cost: cost.get('total_bytes', 0)),
    'processes': hosts.count(),
    'device': f'{mesh.size} x {mesh.devices.flat[0].device_kind}',
    'backbone_sha256': backbone_sha256,
    'theta_sha256': shared.fingerprint(state['theta']),
  }
  if any(skipped.values()):
    result['skipped'] = {role: found.report() for role, found in skipped.items() if found}
  if damaged(folder):
    result['damaged_checkpoints'] = damaged(folder)
  if told_changes:
    result['changes'] = told_changes
  if hosts.first():
    missing = report.write_report(folder, result, metrics.rows)
    if missing:
      progress.note(missing)
  progress.note(report.line(folder, result['eval']))
  return result
