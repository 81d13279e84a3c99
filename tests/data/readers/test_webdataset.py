"""Tar files of WebDataset, read by their place."""

import gzip
import io
import json
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from jpeft import data
from tests.data.resuming import check_goes_on


def image(value, kind='png', size=(5, 3)):
  file = io.BytesIO()
  Image.new('RGB', size, (value, value, value)).save(file, kind)
  return file.getvalue()


def tar(file, members, form=tarfile.PAX_FORMAT):
  """A tar of {name: bytes}."""
  file.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(file, 'w', format=form) as opened:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      opened.addfile(info, io.BytesIO(content))
  return file


def images(first, last, kind='png'):
  found = {}
  for i in range(first, last):
    found[f'{i:04d}.{kind}'] = image(10 * i, kind)
    found[f'{i:04d}.cls'] = str(i % 3).encode()
  return found


@pytest.mark.parametrize('kind', ['png', 'jpeg', 'webp'])
def test_images_of_numbered_tars(tmp_path, kind):
  tar(tmp_path / 'train-000.tar', images(0, 4, kind))
  tar(tmp_path / 'train-001.tar', images(4, 9, kind), tarfile.GNU_FORMAT)
  tar(tmp_path / 'test.tar', images(9, 11, kind))
  for name in (f'wds:{tmp_path}', f'webdataset:{tmp_path}'):
    train = data.load(name, 'train')
    assert train.classes == ['0', '1', '2'] and len(train) == 9
    found = sorted((int(e['image'][0, 0, 0].astype(int) + 1) // 10, e['label']) for e in train)
    assert found == [(i, i % 3) for i in range(9)]
    assert [e['label'] for e in data.load(name, 'test[:2]')] in ([0, 1], [1, 0])
  both = data.load(f'wds:{tmp_path}/train-{{000..001}}.tar', 'train+test')
  assert len(both) == 9 and both[0]['image'].shape == (3, 5, 3)


def test_the_package_of_that_name_reads_the_same(tmp_path):
  web = pytest.importorskip('webdataset')
  file = str(tmp_path / 'train.tar')
  with web.TarWriter(file) as writer:
    for i in range(6):
      sample = {'__key__': f'a/{i}', 'jpg': image(40 * i, 'jpeg'), 'json': {'label': f'c{i % 2}'}}
      writer.write(sample)
  theirs = {}
  with open(file, 'rb') as opened:
    members = web.tariterators.tar_file_expander([{'url': file, 'stream': opened}])
    for sample in web.tariterators.group_by_keys(members):
      pixels = np.array(Image.open(io.BytesIO(sample['jpg'])))
      theirs[pixels.tobytes()] = json.loads(sample['json'])['label']
  assert len(theirs) == 6
  ours = data.load(f'wds:{file}', 'train+test')
  assert {e['image'].tobytes(): ours.classes[e['label']] for e in ours} == theirs


def test_texts_pairs_and_fields(tmp_path):
  members = {}
  for i in range(4):
    members[f'{i}.txt'] = f't{i}'.encode()
    members[f'{i}.second.txt'] = f's{i}'.encode()
    members[f'{i}.json'] = json.dumps({'class': 'ab'[i % 2], 'caption': f'c{i}'}).encode()
  file = tar(tmp_path / 'a.tar', members)
  source = data.load(f'wds:{file}?label=json.class', 'train+test')
  assert sorted(e['text'] for e in source) == ['t0', 't1', 't2', 't3']
  pairs = data.load(f'wds:{file}?text=json.caption&pair=second.txt&label=json.class', 'train+test')
  assert {'text': 'c3', 'pair': 's3', 'label': 1} in list(pairs) and pairs.classes == ['a', 'b']
  with pytest.raises(ValueError, match=r'which member is the label.*samples have txt, second\.txt'):
    data.load(f'wds:{file}', 'train')
  with pytest.raises(ValueError, match=r"no sample has 'json\.clas'; did you mean 'json\.class'"):
    data.load(f'wds:{file}?label=json.clas', 'train')


def test_what_is_no_sample_is_passed_by(tmp_path):
  long = 'very/' * 40 + 'deep/7'
  members = {'./README': b'x', './._0.png': b'x', f'{long}.PNG': image(70), f'{long}.cls': b' 1\n'}
  file = tar(tmp_path / 'a.tar', members)
  (only,) = data.load(f'wds:{file}', 'train+test')
  assert int(only['image'][0, 0, 0]) == 70


def written(values):
  """A tar's members for {key: the values of its JSON}, each with an image."""
  found = {}
  for key, value in values.items():
    found[f'{key}.png'] = image(10 * int(key))
    found[f'{key}.json'] = json.dumps(value).encode()
  return found


def by_pixel(source):
  """{what the image was made of: its label}; labels are known without the image as well."""
  examples = list(source)
  for label, example in zip(data.labels_of(source), examples, strict=True):
    np.testing.assert_array_equal(label, example['label'])
  return {int(e['image'][0, 0, 0]) // 10: e['label'].tolist() for e in examples}


def test_numbers_and_sets(tmp_path):
  values = {
    '0': {'x': 1, 'y': 0.5, 'topics': ['b', 'a'], 'red': True, 'big': 0},
    '1': {'x': -2, 'y': None, 'topics': [], 'red': 0, 'big': -1},
  }
  tar(tmp_path / 'train.tar', written(values))
  tar(tmp_path / 'test.tar', written({'2': {'x': -1, 'y': -1}}))
  source = data.load(f'wds:{tmp_path}?label=json.x,json.y', 'train', labels='numbers')
  found = by_pixel(source)
  assert source.classes == ['json.x', 'json.y'] and found[0] == [1.0, 0.5] and found[1][0] == -2.0
  assert np.isnan(found[1][1])
  with pytest.raises(ValueError, match="no split 'test': .* has no labels"):
    data.load(f'wds:{tmp_path}?label=json.x', 'test', labels='numbers')
  source = data.load(f'webdataset:{tmp_path}?label=json.topics', 'train', labels='sets')
  assert source.classes == ['a', 'b'] and by_pixel(source) == {0: [1.0, 1.0], 1: [0.0, 0.0]}
  source = data.load(f'wds:{tmp_path}?label=json.red,json.big', 'train', labels='sets')
  found = by_pixel(source)
  assert found[0] == [1.0, 0.0] and found[1][0] == 0.0 and np.isnan(found[1][1])
  tar(tmp_path / 'a.tar', {'0.txt': b'fine', '0.cls': b'3.5', '1.txt': b'poor', '1.cls': b'1'})
  source = data.load(f'wds:{tmp_path}/a.tar', 'train+test', labels='numbers')
  assert {e['text']: e['label'].tolist() for e in source} == {'fine': [3.5], 'poor': [1.0]}


@pytest.mark.parametrize(
  ('value', 'labels', 'said'),
  [
    (
      {'x': 'a'},
      'numbers',
      r"sample '0' of .*train\.tar has 'a' as its 'json\.x'; it must be a number",
    ),
    ({'x': None}, 'numbers', "sample '1' of .* has no label: json.x are empty"),
    ({'x': 'a'}, 'sets', "has 'a' as its 'json.x'; it must be a list"),
    ({'x': [['a']]}, 'sets', 'it must be a list of texts or integers'),
    ({'x': 1}, 'tags', "wds:PATH is not read for config.task='tokens'"),
  ],
)
def test_numbers_and_sets_that_are_wrong(tmp_path, value, labels, said):
  values = {'0': value, '1': {'x': None}}
  if value == {'x': None}:
    values['0'] = {'x': 1}
  tar(tmp_path / 'train.tar', written(values))
  with pytest.raises(ValueError, match=said):
    data.load(f'wds:{tmp_path}?label=json.x', 'train', labels=labels)


def test_rows_without_a_label(tmp_path):
  members = images(0, 3) | {'8.png': image(0), '9.png': image(0), '9.cls': b'-1'}
  tar(tmp_path / 'train.tar', members)
  tar(tmp_path / 'test.tar', {'0.png': image(0)})
  with pytest.raises(ValueError, match=r"sample '8' of .*train\.tar has None as its 'cls'"):
    data.load(f'wds:{tmp_path}', 'train')
  kept = data.load(f'wds:{tmp_path}?unlabelled=skip', 'train')
  assert len(kept) == 3 and '2 rows without a label' in kept.notes[0]
  with pytest.raises(ValueError, match="no split 'test': .* has no labels"):
    data.load(f'wds:{tmp_path}?unlabelled=skip', 'test')


@pytest.mark.parametrize(
  ('content', 'said'),
  [
    (lambda whole: gzip.compress(whole), r'train\.tar is compressed \(gzip\)'),
    (lambda whole: b'\x28\xb5\x2f\xfd' + whole, r'is compressed \(zstd\)'),
    (lambda whole: b'text' * 200, r'train\.tar is no tar file, or is broken'),
    (lambda whole: whole[:2300], r'train\.tar is cut off: it ends after 2,300 bytes'),
    (lambda whole: whole[:2048], 'is cut off: it ends after 2,048 bytes without the mark'),
  ],
)
def test_broken_and_compressed_tars(tmp_path, content, said):
  file = tar(tmp_path / 'train.tar', images(0, 3))
  file.write_bytes(content(file.read_bytes()))
  with pytest.raises(ValueError, match=said):
    data.load(f'wds:{tmp_path}', 'train')


@pytest.mark.parametrize(
  ('members', 'said'),
  [
    ({'README': b'x'}, r'train\.tar has no samples'),
    (
      {'0.png': image(0), '0.cls': b'1', '1.cls': b'0'},
      r"sample '1' of .* has no \.png for its im",
    ),
    ({'0.cls': b'1'}, 'which member is the image or text'),
    ({'0.png': image(0), '0.cls': b'\xff'}, r"sample '0' of .*: its \.cls is not UTF-8 text"),
    ({'0.png': image(0), '0.json': b'[1]'}, r'its \.json is a JSON list, not an object'),
    ({'0.png': image(0), '0.json': b'{'}, r'its \.json is no JSON'),
    (
      {'0.png': image(0), '0.json': b'{"label": [1]}'},
      r'has \[1\] as its label; it must be a text',
    ),
    ({'0.png': image(0), '0.PNG': image(0), '0.cls': b'1'}, r'has two members \.png'),
  ],
)
def test_what_is_wrong_is_said(tmp_path, members, said):
  tar(tmp_path / 'train.tar', members)
  with pytest.raises(ValueError, match=said):
    data.load(f'wds:{tmp_path}', 'train')


def test_a_broken_image_and_links_are_named(tmp_path):
  tar(tmp_path / 'train.tar', {'0.png': b'hello', '0.cls': b'1'})
  source = data.load(f'wds:{tmp_path}', 'train')
  with pytest.raises(ValueError, match=r"\.png of sample '0' of .*train\.tar is no readable image"):
    source[0]
  with tarfile.open(tmp_path / 'train.tar', 'a') as opened:
    link = tarfile.TarInfo('1.png')
    link.type = tarfile.SYMTYPE
    link.linkname = '/etc/passwd'
    opened.addfile(link)
  with pytest.raises(ValueError, match=r"'1\.png' of .*train\.tar is a link"):
    data.load(f'wds:{tmp_path}', 'train')
  (tmp_path / 'more.tar.gz').write_bytes(b'')
  with pytest.raises(ValueError, match=r'more\.tar\.gz is compressed \(gz\)'):
    data.load(f'wds:{tmp_path}', 'train')


def test_opening_reads_headers_and_labels_alone(tmp_path):
  noise = np.random.default_rng(0).integers(0, 256, (120, 120, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(noise).save(file, 'png')
  picture = file.getvalue()  # about 43 kB: noise does not compress
  members = {}
  for i in range(200):
    members |= {f'{i}.png': picture, f'{i}.cls': str(i % 2).encode()}
  whole = tar(tmp_path / 'train.tar', members).stat().st_size

  def read_so_far():
    lines = pathlib.Path('/proc/self/io').read_text().splitlines()
    return int(dict(line.split(': ') for line in lines)['rchar'])

  before = read_so_far()
  source = data.load(f'wds:{tmp_path}', 'train')
  opened = read_so_far() - before
  np.testing.assert_array_equal(source[100]['image'], noise)
  row = read_so_far() - before - opened
  assert len(source) == 200 and opened < whole / 40 and row < whole / 50
  before = read_so_far()
  data.load(f'wds:{tmp_path}', 'train')  # the index is kept; labels are read again
  assert read_so_far() - before < opened


def test_batches_go_on_from_any_place(tmp_path):
  tar(tmp_path / 'train-0.tar', images(0, 12))
  tar(tmp_path / 'train-1.tar', images(12, 20))

  def batches():
    return data.Batches(data.load(f'wds:{tmp_path}', 'train'), 4, seed=3)

  check_goes_on(batches, 7)
