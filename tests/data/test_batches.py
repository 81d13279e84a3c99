"""Batches: one order, whatever the position, the threads and the processes."""

import itertools
import json
import threading

import grain
import numpy as np
import pytest

from jpeft.data import Batches, Source, in_memory

SIZE, BATCH = 11, 4


def source(size=SIZE, read=None):
  return Source(
    read or (lambda row: {'x': np.full(2, row, np.float32), 'label': row}), range(size), ['a']
  )


def noisy(example, rng):
  return example | {'noise': rng.random(3)}


def make(**kwargs):
  return Batches(source(), BATCH, noisy, **{'seed': 3, 'epochs': 3} | kwargs)


def same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], strict=True)


def rows(batches):
  return [batch['label'].tolist() for batch in batches]


def test_an_epoch_has_every_example_once_in_a_new_order():
  labels = rows(Batches(source(12), 4, epochs=2, seed=1))
  first, second = sum(labels[:3], []), sum(labels[3:], [])
  assert sorted(first) == sorted(second) == list(range(12))
  assert first != second and first != list(range(12))


def test_the_seed_fixes_the_order_and_the_noise():
  for a, b in zip(make(), make(prefetch=0), strict=True):
    same(a, b)
  assert rows(make()) != rows(make(seed=4))
  assert len(list(make())) == 3 * make().steps_per_epoch == 6


def test_the_order_never_changes():
  assert rows(Batches(source(6), 3, epochs=2)) == [[1, 4, 5], [2, 0, 3], [2, 3, 1], [0, 4, 5]]


def test_noise_hangs_on_epoch_and_example_alone():
  def noise(batch_size, shuffle, epoch):
    batches = Batches(source(12), batch_size, noisy, shuffle=shuffle, epochs=2)
    found = [b for i, b in enumerate(batches) if i // batches.steps_per_epoch == epoch]
    return {
      int(label): tuple(x) for b in found for label, x in zip(b['label'], b['noise'], strict=True)
    }

  assert noise(4, True, 0) == noise(6, False, 0)
  assert len(set(noise(4, True, 0).values()) | set(noise(4, True, 1).values())) == 24


@pytest.mark.parametrize('prefetch', [0, 1, 3])
@pytest.mark.parametrize('drop_remainder', [True, False])
def test_resuming_anywhere_goes_on_as_if_never_stopped(prefetch, drop_remainder):
  whole = list(make(prefetch=0, drop_remainder=drop_remainder))
  assert len(whole) == (6 if drop_remainder else 9)
  for position in range(len(whole) + 1):
    first = make(prefetch=prefetch, drop_remainder=drop_remainder)
    list(itertools.islice(first, position))
    second = make(prefetch=prefetch, drop_remainder=drop_remainder)
    list(itertools.islice(second, 2))  # what it has made ahead must not come out
    second.restore(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    for a, b in zip(second, whole[position:], strict=True):
      same(a, b)


def test_restoring_reads_nothing_that_lies_before():
  read = []
  batches = Batches(source(100, lambda row: read.append(row) or {'label': row}), 10, prefetch=0)
  batches.restore(batches.state() | {'epoch': 10**6, 'batch': 7})
  assert not read
  batch = next(batches)
  assert sorted(read) == sorted(batch['label'].tolist()) and len(read) == 10
  assert (batches.state()['epoch'], batches.state()['batch']) == (10**6, 8)


def test_the_state_counts_what_was_yielded_not_what_was_made_ahead():
  made = threading.Semaphore(0)
  batches = Batches(source(12, lambda row: made.release() or {'label': row}), 4, prefetch=2)
  next(batches)
  for _ in range(12):  # three batches of four
    assert made.acquire(timeout=10)
  assert (batches.state()['epoch'], batches.state()['batch']) == (0, 1)


def test_epochs_end_and_none_has_no_end():
  batches = make(epochs=1)
  assert len(list(batches)) == 2 and list(batches) == []
  assert list(make(epochs=0)) == []
  assert len(list(itertools.islice(make(epochs=None), 50))) == 50
  assert (batches.state()['epoch'], batches.state()['batch']) == (1, 0)


def test_the_last_batch_is_filled_up_under_a_mask():
  batches = list(Batches(source(), BATCH, shuffle=False, epochs=1, drop_remainder=False))
  assert rows(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 10]]
  assert [b['mask'].tolist() for b in batches] == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]]
  assert batches[0]['mask'].dtype == np.float32
  small = next(Batches(source(2), 5, shuffle=False, drop_remainder=False))
  assert small['label'].tolist() == [0, 1, 1, 1, 1] and small['mask'].sum() == 2


def test_processes_divide_a_batch_and_share_a_state():
  whole = list(make(drop_remainder=False))
  parts = [list(make(drop_remainder=False, process_index=i, process_count=2)) for i in range(2)]
  for batch, *halves in zip(whole, *parts, strict=True):
    same(batch, {name: np.concatenate([half[name] for half in halves]) for name in batch})
  alone, half = make(), make(process_index=1, process_count=2)
  next(half)
  alone.restore(half.state())
  np.testing.assert_array_equal(next(alone)['label'][2:], next(half)['label'])


def test_rows_of_a_batch_by_their_numbers():
  whole, part = make(), make(rows=(0, 3))
  for _ in range(3):
    batch = next(whole)
    same({name: x[[0, 3]] for name, x in batch.items()}, next(part))
  with pytest.raises(ValueError, match='rows and process_count both say'):
    make(rows=(0, 3), process_count=2)


def test_a_batch_is_looked_at_before_it_is_taken():
  class Broken:
    def __len__(self):
      return 12

    def __getitem__(self, i):
      if i == 9:
        raise ValueError('example 9 is broken')
      return {'label': i}

  batches = Batches(Broken(), BATCH, shuffle=False, prefetch=2)
  batches.check(0)
  batches.check(1)
  next(batches)
  for _ in range(2):
    with pytest.raises(ValueError, match='example 9'):
      batches.check(1)
  assert batches.state()['batch'] == 1
  assert next(batches)['label'].tolist() == [4, 5, 6, 7]
  with pytest.raises(ValueError, match='example 9'):
    next(batches)


def test_numbers_take_the_widths_of_jax():
  batch = next(Batches(source(), BATCH, noisy))
  assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
    'x': ('float32', (4, 2)),
    'label': ('int32', (4,)),
    'noise': ('float32', (4, 3)),
  }


@pytest.mark.parametrize('prefetch', [0, 2])
def test_an_error_comes_at_its_batch_and_comes_again(prefetch):
  def read(row):
    if row == 5:
      raise ValueError('example 5 is broken')
    return {'label': row}

  batches = Batches(source(12, read), 4, shuffle=False, prefetch=prefetch)
  assert next(batches)['label'].tolist() == [0, 1, 2, 3]
  for _ in range(2):
    with pytest.raises(ValueError, match='example 5 is broken'):
      next(batches)
  assert batches.state()['batch'] == 1


@pytest.mark.parametrize(
  'change, text',
  [
    ({'seed': 4}, 'taken with seed=3, these batches have seed=4'),
    ({'drop_remainder': False}, 'drop_remainder=True, these batches have drop_remainder=False'),
    ({'shuffle': False}, 'shuffle=True'),
  ],
)
def test_a_state_of_other_batches_is_refused(change, text):
  with pytest.raises(ValueError, match=text):
    make(**change).restore(make().state())


def test_a_state_that_is_none_is_refused():
  with pytest.raises(ValueError, match="has no 'epoch'"):
    make().restore({'step': 3})
  with pytest.raises(ValueError, match='epoch 3, batch 1 is beyond the end'):
    make().restore(make().state() | {'epoch': 3, 'batch': 1})


@pytest.mark.parametrize(
  'kwargs, text',
  [
    ({'batch_size': 12}, 'batch_size=12 is more than the 11 examples'),
    ({'batch_size': 0}, 'batch_size=0 is less than 1'),
    ({'seed': -1}, 'seed=-1 is less than 0'),
    ({'process_count': 3}, 'batch_size=4 is not divisible by process_count=3'),
    ({'process_index': 2, 'process_count': 2}, 'process_index=2 is not below process_count=2'),
    ({'source': source(0)}, 'no examples'),
  ],
)
def test_arguments_are_checked_at_once(kwargs, text):
  with pytest.raises(ValueError, match=text):
    Batches(**{'source': source(), 'batch_size': BATCH} | kwargs)


def test_examples_of_unlike_shape_are_named():
  unlike = source(4, lambda row: {'image': np.zeros((row + 1, 2))})
  with pytest.raises(ValueError, match=r"'image' has the shapes \(1, 2\) and \(4, 2\)"):
    next(Batches(unlike, 4))
  with pytest.raises(ValueError, match="an example of a batch has 'b'"):
    next(Batches(source(2, lambda row: {'b': 1} if row == 0 else {'c': 1}), 2, shuffle=False))
  with pytest.raises(ValueError, match="the transform returns 'mask'"):
    next(Batches(source(2, lambda row: {'mask': 1}), 2, drop_remainder=False))


def test_in_memory_reads_each_example_once():
  read = []
  kept = in_memory(source(5, lambda row: read.append(row) or {'label': row}))
  assert rows(Batches(kept, 5, shuffle=False, epochs=2)) == [[0, 1, 2, 3, 4]] * 2
  assert read == [0, 1, 2, 3, 4] and len(kept) == 5 and kept.classes == ['a']


def test_grain_reads_a_source():
  loaded = grain.MapDataset.source(source()).shuffle(seed=0).map(lambda e: e['label']).batch(4)
  assert sorted(np.concatenate(list(loaded)).tolist()) == list(range(SIZE))
