"""Killed at any step and started again, a run ends with the bits of one that was left alone."""

import contextlib
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from safetensors.numpy import load_file

from jpeft.training.metrics import read_metrics
from tests.training import killing

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 60
OPTIONS = {
  'steps': STEPS,
  'log.every': 1,
  'eval.every': 7,
  'checkpoint.every': 5,
  'data.augment': 'flip_crop',
}


# Starts a command with the usual signals: a process in the background ignores Ctrl-C. With a
# terminal as its input, this becomes its own.
LAUNCH = """
import fcntl, os, signal, sys, termios
for number in (signal.SIGINT, signal.SIGHUP):
  signal.signal(number, signal.SIG_DFL)
if os.isatty(0):
  fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.fixture(scope='module')
def start(config_file, compilations):
  """start(folder) -> the process of a training run; compilations are shared."""
  env = killing.environment(compilations)
  flags = [f'--config.{key}={value}' for key, value in OPTIONS.items()]

  def started(folder, *more, **options):
    pipes = {
      'stdin': subprocess.DEVNULL,
      'stdout': subprocess.PIPE,
      'stderr': subprocess.PIPE,
      'text': True,
    }
    command = [
      sys.executable,
      '-c',
      LAUNCH,
      '-m',
      'jpeft.train',
      f'--config={config_file}',
      *flags,
      *more,
      f'--workdir={folder}',
    ]
    return subprocess.Popen(command, env=env, **{**pipes, **options})

  return started


@pytest.fixture(scope='module')
def alone(start, tmp_path_factory):
  """The folder of a run that nothing disturbed."""
  folder = tmp_path_factory.mktemp('alone') / 'run'
  process = start(folder)
  _, told = process.communicate(timeout=600)
  assert process.returncode == 0, told
  return folder


def test_sigkill_at_random_steps(start, alone, tmp_path):
  rng, folder = random.Random(time.time_ns()), tmp_path / 'run'
  for low, high in ((1, 20), (21, 40), (41, 55)):
    process, step = start(folder), rng.randint(low, high)
    killing.reached(process, folder, step)
    time.sleep(rng.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (folder / 'theta.safetensors').exists()
  process = start(folder)
  _, told = process.communicate(timeout=120)
  assert process.returncode == 0, told
  assert 'going on after' in told
  killing.assert_same(folder, alone, STEPS)


def kill(process, folder, rng, seconds):
  """Kills a process at a random moment; returns whether it was still at work.

  Either some time after its start, or while it makes updates, or when the first files of its end
  are there.
  """
  moment = rng.choice(['time', 'step', 'step', 'end'])
  end = time.monotonic() + rng.uniform(0, seconds)
  step = rng.randint(1, STEPS)
  made = killing.watched(folder)
  theta = folder / 'theta.safetensors'
  before = killing.written(theta)

  def has_come():
    if moment == 'time':
      return time.monotonic() > end
    if moment == 'end':
      return killing.written(theta) != before
    return made(step)

  while process.poll() is None and not has_come():
    time.sleep(0.002)
  if moment != 'time':
    time.sleep(rng.uniform(0, 0.2))
  process.send_signal(signal.SIGKILL)
  process.communicate()
  return process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_hundred_sigkills(start, alone, tmp_path):
  """JPEFT_KILLS and JPEFT_SEED in the environment: how many, and when."""
  wanted = int(os.environ.get('JPEFT_KILLS', 100))
  seed = int(os.environ.get('JPEFT_SEED', time.time_ns()))
  rng = random.Random(seed)
  begun = time.monotonic()
  start(tmp_path / 'measured').communicate()
  seconds = time.monotonic() - begun
  kills = 0
  runs = 0
  while kills < wanted:
    folder = tmp_path / f'run-{runs}'
    for _ in range(rng.randint(2, 8)):
      kills += kill(start(folder), folder, rng, seconds)
    process = start(folder)
    _, told = process.communicate(timeout=600)
    assert process.returncode == 0, (seed, runs, told)
    assert 'warning' not in told, (seed, runs, told)
    killing.assert_same(folder, alone, STEPS)
    runs += 1
    print(f'seed {seed}: {kills} kills, {runs} runs, no difference', flush=True)


def test_sigterm_saves_and_exits(start, alone, tmp_path):
  folder = tmp_path / 'run'
  process = start(folder)
  killing.reached(process, folder, 13)
  process.send_signal(signal.SIGTERM)
  _, told = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGTERM, told
  last = max(int(p.name) for p in (folder / 'checkpoints').iterdir())
  assert f'stopped by SIGTERM; checkpoint {last} of {STEPS}' in told and 'Traceback' not in told
  assert last >= read_metrics(folder / 'metrics.jsonl')[-1]['step'] >= 13  # nothing is lost
  process = start(folder)
  _, told = process.communicate(timeout=120)
  assert process.returncode == 0 and f'going on after {last}' in told, told
  killing.assert_same(folder, alone, STEPS)


def test_a_terminal_that_is_closed_saves_and_exits(start, tmp_path):
  folder = tmp_path / 'run'
  ours, theirs = os.openpty()

  terminal = {'stdin': theirs, 'stdout': theirs, 'stderr': theirs}
  process = start(folder, start_new_session=True, **terminal)
  os.close(theirs)
  shown = threading.Thread(target=drain, args=(ours, process), daemon=True)
  shown.start()
  killing.reached(process, folder, 13)
  os.close(ours)  # the kernel sends SIGHUP, and nothing can be printed any more
  assert process.wait(timeout=120) == 128 + signal.SIGHUP
  last = max(int(p.name) for p in (folder / 'checkpoints').iterdir())
  assert last >= read_metrics(folder / 'metrics.jsonl')[-1]['step'] >= 13


def drain(terminal, process):
  """Reads what a process shows, so that it never waits."""
  with contextlib.suppress(OSError):
    while process.poll() is None:
      os.read(terminal, 4096)


def test_ctrl_c_twice_is_one_line(start, tmp_path):
  folder = tmp_path / 'run'
  process = start(folder)
  killing.reached(process, folder, 13)
  for _ in range(2):
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
  _, told = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGINT
  last = told.splitlines()[-1]
  assert 'Traceback' not in told and last.startswith('jpeft.train: stopped by SIGINT; '), told
  assert re.search(r'(checkpoint \d+ of 60 is in .*|goes on from checkpoint \d+)', last)


def test_ctrl_c_before_the_run_is_one_line(start, tmp_path):
  process = start(tmp_path / 'run')
  while 'jaxlib' not in pathlib.Path(f'/proc/{process.pid}/maps').read_text():
    time.sleep(0.002)
  time.sleep(random.uniform(0, 1))  # from the import of jax on
  process.send_signal(signal.SIGINT)
  printed, told = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGINT, told
  assert printed == '' and len(told.splitlines()) == 1 and 'stopped by SIGINT' in told


@pytest.mark.slow
def test_numbers_survive_kills(start, images, tmp_path):
  table = tmp_path / 'numbers.csv'
  files = sorted(images.rglob('*.png'))
  lines = [f'{file},{100 + i},{-i}' for i, file in enumerate(files)]
  table.write_text('\n'.join(['image,a,b', *lines]))
  more = (
    '--config.task=regression',
    f'--config.data.name=csv:{table}?image=image&label=a,b',
    '--config.eval.metric=spearman',
    '--config.loss.name=huber',
  )
  alone, killed = killing.run_and_killed_run(start, tmp_path, more, timeout=120)
  killing.assert_same(killed, alone, STEPS)


VISION = {
  'snell': (),
  'snella': ('--config.method.every=7', '--config.method.rounds=6'),
  'sct': ('--config.method.channels=4',),
  'spt': ('--config.method.budget=600', '--config.method.step=50', '--config.method.rank=1'),
  'bi_adaptformer': ('--config.method.bottleneck=4',),
  'bi_lora': ('--config.method.rank=4',),
  'adalora': ('--config.method.rank=4', '--config.method.every=2'),
  'paca': ('--config.method.rank=4',),
  'vb_lora': ('--config.method.vectors=6', '--config.method.length=4'),
  'randlora': ('--config.method.rank=4', '--config.method.alpha=8'),
  'eva': ('--config.method.rank=2', '--config.method.batches=3'),
  'lamda': ('--config.method.rank=4',),
  'switchlora': ('--config.method.rank=4', '--config.method.interval=10'),
  'pst': ('--config.method.rank=4',),
  'lt_sft': (
    '--config.method.count=300',
    '--config.method.first_steps=4',
    '--config.method.first_lr=1e-3',
    '--config.optimizer.name=adamw_8bit',
  ),
  'lamda_pp': ('--config.method.rank=4',),
  'light_peft': (
    '--config.method.rank=4',
    '--config.method.updates=4',
    '--config.method.batch_size=6',
    '--config.method.rate=1e-2',
  ),
  'loraprune': ('--config.method.rank=4',),
  'dyt': ('--config.method.bottleneck=4', '--config.method.budget=0.75'),
  'explora': ('--config.method.rank=4',),
  'e2vpt': (
    '--config.method.tokens=4',
    '--config.method.prune_tokens=0.5',
    '--config.method.prune_segments=0.5',
    '--config.method.prune_after=30',
  ),
}


def told_by(*command) -> tuple[int, str]:
  """(exit code, what was printed) of a command of jpeft."""
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  done = subprocess.run(
    [sys.executable, '-m', 'jpeft', *command], env=env, capture_output=True, text=True, timeout=300
  )
  return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize('method', VISION)
def test_methods_for_images_survive_kills_and_are_served(
  start, config_file, images, tmp_path, method
):
  more = (f'--config.method.name={method}', *VISION[method])
  alone, killed = killing.run_and_killed_run(start, tmp_path, more, timeout=300)
  theta = load_file(alone / 'theta.safetensors')
  assert any(name.startswith(method) for name in theta)
  killing.assert_same(killed, alone, STEPS, arrays=len(theta))
  if method == 'snella':  # rounds were over before and after the kill
    assert len({float(x) for name, x in theta.items() if name.endswith('/kept')}) > 4
  if method == 'e2vpt':  # the masks were made behind the kill, of gradients from before it
    (tokens,) = (x for name, x in theta.items() if name.endswith('/tokens') and x.max() == 1)
    assert sorted(tokens) == [0, 0, 1, 1]

  code, told = told_by('plan', f'--config={config_file}', *more, '--target=cpu')
  assert code == 0 and method in told, told
  image = next(iter(sorted(images.rglob('*.png'))))
  code, told = told_by('predict', f'--run={killed}', f'--input={image}')
  assert code == 0 and image.name in told, told
  code, told = told_by('merge', f'--run={killed}', f'--out={tmp_path / "merged"}')
  if method in ('bi_adaptformer', 'dyt', 'e2vpt', 'sct'):
    assert code != 0 and 'cannot be merged' in told, told
  else:
    assert code == 0 and (tmp_path / 'merged' / 'model.safetensors').is_file(), told


PRETRAINING = {
  'mae': ('--config.pretraining.width=32', '--config.pretraining.depth=1'),
  'dino': (
    '--config.pretraining.prototypes=16',
    '--config.pretraining.width=32',
    '--config.pretraining.crops=1',
    '--config.pretraining.momentum=0.9',
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize('task', PRETRAINING)
def test_pretraining_survives_kills_and_leaves_a_backbone(
  start, config_file, images, tmp_path, task
):
  explora = ('--config.method.name=explora', '--config.method.rank=2')
  more = (f'--config.task={task}', *explora, *PRETRAINING[task])
  alone, killed = killing.run_and_killed_run(start, tmp_path, more, timeout=600)
  theta = load_file(alone / 'theta.safetensors')
  assert {name.split('/')[0] for name in theta} == {'explora', 'explora_lora', 'explora_norm'}
  killing.assert_same(killed, alone, STEPS, arrays=len(theta))

  code, told = told_by('plan', f'--config={config_file}', *more, '--target=cpu')
  assert code == 0 and 'explora' in told, told
  image = next(iter(sorted(images.rglob('*.png'))))
  code, told = told_by('predict', f'--run={killed}', f'--input={image}')
  assert code != 0 and 'there is nothing to predict: merge it' in told, told
  code, told = told_by('merge', f'--run={killed}', f'--out={tmp_path / "merged"}')
  assert code == 0 and (tmp_path / 'merged' / 'model.safetensors').is_file(), told

  second = ('--config.method.name=lora', f'--config.model.source={tmp_path / "merged"}')
  process = start(tmp_path / 'second', *second, '--config.steps=3')
  _, told = process.communicate(timeout=600)
  assert process.returncode == 0, told
  names = {name.split('/')[0] for name in load_file(tmp_path / 'second/theta.safetensors')}
  assert names == {'lora', 'head'}


METHOD = '''"""An adapter behind a running mean, with a loss of its own, beside a low-rank product.

From update 30 on the adapter is trained in part. The layers share a factor of the product, and each
fourth update clears the moments of the other.
"""

import jax
import jax.numpy as jnp

import jpeft


def behind_mean(rank=2, name='behind_mean'):
  def init(key, site, arrays):
    width = site.out.shape[-1]
    down = 0.1 * jax.random.normal(key, (width, rank))
    state = {'mean': jnp.zeros(width), 'count': jnp.zeros((), jnp.int32)}
    return {**state, 'down': down, 'up': jnp.zeros((rank, width))}

  def apply(t, call, *args, **kwargs):
    def adapted(h):
      mean = t['mean']
      if call.training:
        mean = h.mean((0, 1))
        call.write(mean=0.9 * t['mean'] + 0.1 * mean, count=t['count'] + 1)
      y = jnp.tanh((h - mean) @ t['down'])
      call.aux(size=jnp.abs(y).mean())
      return h + y @ t['up']

    return call.site.map_stream(call(*args, **kwargs), adapted)

  def loss(task_loss, run):
    out, aux = run()
    return task_loss(out) + 0.1 * aux['size'].mean(), out

  stages = ((30, ('mean', 'down')),)
  adapter = jpeft.Call(name, apply, init, fixed=('mean',), loss=loss, stages=stages)
  return jpeft.chain(jpeft.at('{block}', adapter), shared_low_rank(rank))


def shared_low_rank(rank, name='shared'):
  def init(key, w):
    return {'a': jax.random.normal(key, (w.shape[0], rank)), 'b': jnp.zeros((rank, w.shape[1]))}

  def edit(state, grads, step, key):
    cleared = jax.tree.map(lambda m: jnp.where(step % 4 == 0, 0.0, m), state.moments)
    return state._replace(moments=cleared)

  def init_shared(key, places):
    own = {path: {'b': place.t['kernel']['b']} for path, place in places.items()}
    return {'': {'a': next(iter(places.values())).t['kernel']['a']}, **own}

  def expand(t, places):
    return {path: {'kernel': {'a': t['']['a'], 'b': t[path]['b']}} for path in places}

  product = jpeft.matrix(name, init, lambda t, w: w + t['a'] @ t['b'], edit=edit)
  return jpeft.generated(jpeft.at('{q}|{v}', product), init_shared, expand)


jpeft.register_method('behind_mean', behind_mean, title='an adapter behind a running mean')
'''


def test_all_that_a_method_may_be_survives_kills(start, tmp_path):
  file = tmp_path / 'behind_mean.py'
  file.write_text(METHOD)
  more = (
    f'--import={file}',
    '--config.method.name=behind_mean',
    '--config.method.layers=-1:',
    '--config.optimizer.accumulate=2',
  )
  alone = tmp_path / 'alone'
  process = start(alone, *more)
  _, told = process.communicate(timeout=120)
  assert process.returncode == 0, told
  assert 'after 30 updates: ' in told

  killed = tmp_path / 'killed'
  for step in (23, 43):  # in the first stage and in the second
    process = start(killed, *more)
    killing.reached(process, killed, step)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=120)
  process = start(killed, *more)
  _, told = process.communicate(timeout=120)
  assert process.returncode == 0, told
  killing.assert_same(alone, killed, STEPS, arrays=9)

  theta = load_file(alone / 'theta.safetensors')
  layers = {name.split('/')[2] for name in theta if name.startswith('behind_mean')}
  assert layers == {'block_1'}
  assert theta['behind_mean/encoder/block_1/count'] == 2 * STEPS  # two micro-batches an update
  assert abs(theta['behind_mean/encoder/block_1/mean']).max() > 0
