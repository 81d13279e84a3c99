"""A run knows its examples: changed ones are refused, broken ones end it or are skipped."""

import importlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import jpeft
from jpeft import cli, data, training
from jpeft.training import examples
from jpeft.training.metrics import read_metrics, values

BROKEN: set[int] = set()  # examples of the data set below, of its 24 and 10
ANSWERS = {'changed': False}


def broken_dots(data_dir):
  """Reddish and bluish images; those of BROKEN cannot be read."""

  def read(row):
    if row in BROKEN:
      raise ValueError(f'dot-{row}.png is no readable image')
    pixels = np.random.default_rng(row).integers(0, 200, (8, 8, 3), dtype=np.uint8)
    pixels[..., 0 if row % 2 else 2] += 55
    if ANSWERS['changed']:
      pixels = 255 - pixels
    return {'image': pixels, 'label': row % 2}

  rows = {'train': range(24), 'test': range(24, 34)}
  return data.Dataset(read, rows, ['blue', 'red'], label_of=label_of)


def label_of(row):
  return row % 2


@pytest.fixture(autouse=True)
def whole(monkeypatch):
  module = importlib.import_module('jpeft.data.load')  # the face has the function of that name
  monkeypatch.setattr(module, '_REGISTERED', {})  # other tests list what is registered
  jpeft.register_dataset('broken_dots', broken_dots)
  BROKEN.clear()
  ANSWERS['changed'] = False


@pytest.fixture
def run(load, tmp_path, capsys):
  """run(name, **overrides) -> (report, what it has told) of a run on this data set."""

  def started(name='run', **overrides):
    settings = {'data.name': 'broken_dots', 'steps': 20, 'eval.every': 10, **overrides}
    report = training.train(load('linear', **settings), tmp_path / name)
    return report, capsys.readouterr().err

  return started


def log_of(folder):
  rows = read_metrics(folder / 'metrics.jsonl')
  return [(row['step'], row['split'], values(row)) for row in rows]


def forget_end(folder, *steps):
  """As a kill leaves it: without the end, and without some checkpoints."""
  for name in ('report.json', 'theta.safetensors'):
    (folder / name).unlink()
  for step in steps:
    shutil.rmtree(folder / f'checkpoints/{step}')


# ---- Digests.


def source_of(rows):
  return data.Source(rows.__getitem__, range(len(rows)), ['a', 'b'])


def test_a_digest_sees_every_value_of_small_data():
  rows = [{'image': np.full((4, 4, 1), i, np.uint8), 'label': i % 2} for i in range(50)]
  texts = [{'text': f'number {i}', 'label': 0.5, 'more': [1, (None, b'x')]} for i in range(50)]
  for kind, change in ((rows, 'image'), (rows, 'label'), (texts, 'text'), (texts, 'more')):
    before = examples.digest(source_of(kind))
    assert before == examples.digest(source_of(list(kind)))
    assert before['examples'] == 50 and before['unreadable'] == []
    for i in (0, 17, 49):
      value = np.array(kind[i][change], copy=True) + 1 if change in ('image', 'label') else 'new'
      changed = [*kind[:i], {**kind[i], change: value}, *kind[i + 1 :]]
      assert examples.digest(source_of(changed))['sha256'] != before['sha256']


def test_of_large_data_some_rows_are_read(monkeypatch):
  asked = []

  class Large:
    def __len__(self):
      return 10**9

    def __getitem__(self, i):
      asked.append(i)
      return {'image': np.zeros((1000, 1000, 3), np.uint8), 'label': 0}

  monkeypatch.setattr(examples, 'BYTES', 10**6)
  assert examples.digest(Large()) == examples.digest(Large())
  half = len(asked) // 2
  assert asked[:half] == asked[half:] and half == examples.LEAST + 1
  assert len({*asked}) == examples.LEAST and max(asked) > 10**8


def test_examples_are_read_as_they_are_stored():
  asked = []
  stored = np.random.default_rng(0).permutation(50).tolist()
  examples.digest(data.Source(lambda row: asked.append(row) or {'label': row}, stored, []))
  rest = asked[examples.LEAST + 1 :]  # those by which the number is found, and one once more
  assert rest == sorted(rest) and {*asked} == {*range(50)}


def test_a_source_that_answers_anew_is_not_compared():
  rng = np.random.default_rng(0)
  source = data.Source(lambda row: {'x': rng.normal(size=3)}, range(5), [])
  assert examples.digest(source)['sha256'] is None


def test_changed_data_are_refused(run, tmp_path):
  whole, _ = run()
  kept = json.loads((tmp_path / 'run' / 'run.json').read_text())['data']
  assert kept['train']['examples'] == 24 and kept['test']['examples'] == 10
  forget_end(tmp_path / 'run')
  ANSWERS['changed'] = True
  with pytest.raises(cli.Mistake, match="begun with other data: examples of 'train' have changed"):
    run()
  ANSWERS['changed'] = False
  BROKEN.add(30)
  with pytest.raises(cli.Mistake, match="example 6 of 'test' could be read then, and cannot"):
    run()
  BROKEN.clear()
  assert run()[0]['theta_sha256'] == whole['theta_sha256']


def test_pixels_of_the_same_size_are_seen(load, images, tmp_path):
  copy = shutil.copytree(images, tmp_path / 'images')
  settings = load('linear', **{'data.name': f'folder:{copy}', 'steps': 3})
  training.train(settings, tmp_path / 'run')
  forget_end(tmp_path / 'run')
  for file in copy.rglob('*.png'):
    Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
  with pytest.raises(cli.Mistake, match='have changed since; put the data back'):
    training.train(settings, tmp_path / 'run')


# ---- An example that breaks while a run goes.


def break_at(monkeypatch, row, reads):
  """From its n-th reading on, an example cannot be read."""
  left = {'reads': reads}
  content = data.Source.__getitem__

  def read(source, i):
    if len(source) == 24 and i == row:
      left['reads'] -= 1
      if left['reads'] < 0:
        raise ValueError(f'dot-{row}.png is no readable image')
    return content(source, i)

  monkeypatch.setattr(data.Source, '__getitem__', read)


def test_nothing_is_lost_where_an_example_breaks(run, tmp_path, monkeypatch):
  whole, _ = run('whole', **{'checkpoint.every': 20})
  with monkeypatch.context() as patch:
    break_at(patch, 5, reads=3)  # one of the digest, and of two epochs
    with pytest.raises(cli.Mistake) as raised:
      run(**{'checkpoint.every': 20})
  (last,) = [int(path.name) for path in (tmp_path / 'run' / 'checkpoints').iterdir()]
  assert 6 < last < 20
  assert str(raised.value) == (
    f'dot-5.png is no readable image; the same command goes on from checkpoint {last}, and with '
    '--config.data.on_error=skip it skips such examples'
  )
  report, told = run(**{'checkpoint.every': 20})
  assert f'going on after {last}' in told
  assert report['theta_sha256'] == whole['theta_sha256']


def test_a_mended_example_goes_on(run):
  BROKEN.add(5)
  with pytest.raises(cli.Mistake, match='dot-5.png is no readable image; the same command goes on'):
    run()
  BROKEN.clear()
  assert run()[0]['steps'] == 20


def test_skipping_may_be_chosen_when_it_breaks(run):
  BROKEN.add(5)
  with pytest.raises(cli.Mistake):
    run()
  report, told = run(**{'data.on_error': 'skip'})
  assert report['skipped']['train']['examples'] == 1 and 'going on after' in told


@pytest.mark.parametrize('cached', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_broken_examples_are_skipped(run, tmp_path, cached):
  BROKEN.update({3, 4, 9, 30})
  settings = {'data.on_error': 'skip', 'data.cache_features': cached, 'checkpoint.every': 5}
  if cached:
    settings['model.dropout'] = 0.0
  report, told = run('one', **settings)
  for row, split in ((3, 'train'), (4, 'train'), (9, 'train'), (6, 'test')):
    assert told.count(f"example {row} of '{split}' cannot be read and is skipped: dot-") == 1
  found = report['skipped']
  assert found['train']['examples'] == 3 and found['test']['examples'] == 1
  assert found['train']['why']['4'] == 'dot-4.png is no readable image'
  assert "3 of 'train' (" in (tmp_path / 'one/report.md').read_text()
  rows = read_metrics(tmp_path / 'one/metrics.jsonl')
  assert [row['skipped'] for row in rows if row['split'] == 'test'] == [1, 1]
  assert [row['skipped'] for row in rows if row['split'] == 'train'][-1] == 3
  # Nine are scored: shares of accuracy are ninths.
  assert round(report['eval']['accuracy'] * 9, 4).is_integer()

  # Going on gives the same bits, and tells the same again in the log alone.
  run('two', **settings)
  forget_end(tmp_path / 'two', 20)
  again, told = run('two', **settings)
  assert 'going on after 15' in told and 'is skipped' not in told
  assert again['theta_sha256'] == report['theta_sha256'] and again['skipped'] == found
  assert log_of(tmp_path / 'one') == log_of(tmp_path / 'two')

  # What was skipped may not come back in the middle.
  forget_end(tmp_path / 'two')
  BROKEN.discard(4)
  with pytest.raises(cli.Mistake, match="examples of 'train' have changed"):
    run('two', **settings)


def test_data_that_are_gone_are_not_skipped(run):
  BROKEN.update(range(24))
  with pytest.raises(cli.Mistake, match='dot-23.png is no readable image$'):
    run(**{'data.on_error': 'skip'})


def test_of_many_the_first_are_named():
  told = []
  skipped = data.Skipped('train', told.append)
  skipped.add({i: f'why {i}' for i in range(30)})
  assert len(told) == 21 and told[-1] == 'further ones are only counted'
  again = data.Skipped('train', told.append)
  again.restore(json.loads(json.dumps(skipped.state())))
  again.add({7: 'why', 30: 'why'})
  assert len(again) == 31 and len(told) == 21 and again.report()['why']['19'] == 'why 19'
