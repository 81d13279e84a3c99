"""Data sets that TFDS has prepared, read by name from their files alone."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from jpeft import data

tfds = pytest.importorskip('tensorflow_datasets')


def png(value):
  file = io.BytesIO()
  Image.new('RGB', (4, 3), (value, 0, 0)).save(file, 'png')
  file.seek(0)
  return file


class _Owls(tfds.core.GeneratorBasedBuilder):
  """Images with two labels."""

  VERSION = tfds.core.Version('1.0.0')
  FEATURES = {
    'image': tfds.features.Image(shape=(None, None, 3)),
    'label': tfds.features.ClassLabel(names=['cat', 'owl']),
    'coarse': tfds.features.ClassLabel(num_classes=1),
    'size': tfds.features.Scalar(np.int32),
    'age': tfds.features.Scalar(np.float32),
    'parts': tfds.features.Sequence(tfds.features.ClassLabel(names=['beak', 'tail', 'wing'])),
  }
  KEYS = ('image', 'label')

  def _info(self):
    features = tfds.features.FeaturesDict(self.FEATURES)
    return tfds.core.DatasetInfo(
      builder=self, features=features, supervised_keys=self.KEYS, disable_shuffling=True
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples(range(5)), 'test': self._generate_examples(range(7))}

  def _generate_examples(self, numbers):
    for i in numbers:
      yield (
        i,
        {
          'image': png(i),
          'label': i % 2,
          'coarse': 0,
          'size': i,
          'age': i / 4,
          'parts': [0, 2][: i % 3],
        },
      )


class _Some(_Owls):
  """Texts, not all of which have a label."""

  FEATURES = {
    'text': tfds.features.Text(),
    'label': tfds.features.ClassLabel(names=['no', 'yes']),
  }
  KEYS = None

  def _generate_examples(self, numbers):
    for i in numbers:
      unknown = i % 3 == 2 or len(numbers) == 7
      yield i, {'text': f't{i}', 'label': -1 if unknown else i % 2}


class _Pairs(_Owls):
  """Pairs of texts."""

  FEATURES = {
    'premise': tfds.features.Text(),
    'hypothesis': tfds.features.Text(),
    'label': tfds.features.ClassLabel(names=['no', 'yes']),
  }
  KEYS = None
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ('one', 'two')]

  def _generate_examples(self, numbers):
    for i in numbers:
      yield i, {'premise': f'p{i}', 'hypothesis': self.builder_config.name, 'label': i % 2}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """A folder as TFDS fills it."""
  folder = tmp_path_factory.mktemp('tfds')
  for version in ('9.0.0', '10.0.0'):
    _Owls.VERSION = tfds.core.Version(version)
    _Owls(data_dir=str(folder), file_format='array_record').download_and_prepare()
  _Some(data_dir=str(folder), file_format='array_record').download_and_prepare()
  for config in ('one', 'two'):
    builder = _Pairs(config=config, data_dir=str(folder), file_format='array_record')
    builder.download_and_prepare()
  return folder


def test_images_by_name(root, monkeypatch):
  name = _Owls.name
  test = data.load(f'tfds:{name}', 'test', root)
  assert test.classes == ['cat', 'owl'] and len(test) == 7
  assert [(int(e['image'][0, 0, 0]), e['label']) for e in test] == [(i, i % 2) for i in range(7)]
  assert len(data.load(f'tfds:{name}:9.0.0', 'train[:2]+test[-1:]', root)) == 3
  monkeypatch.setenv('TFDS_DATA_DIR', str(root))
  coarse = data.load(f'tfds:{name}?label=coarse', 'train')
  assert coarse.classes == ['0'] and coarse[3]['label'] == 0


def test_texts_of_a_config(root):
  source = data.load(f'tfds:{_Pairs.name}/two?text=premise&pair=hypothesis', 'train', root)
  assert source[1] == {'text': 'p1', 'pair': 'two', 'label': 1} and source.classes == ['no', 'yes']


@pytest.mark.parametrize(
  ('name', 'said'),
  [
    ('{owls}s', "has no data set '.*' that TFDS has prepared; did you mean '{owls}'"),
    ('{owls}:3.0.0', "has no data set '{owls}:3.0.0' that TFDS has prepared"),
    ('{pairs}', 'has several configs, name one: {pairs}/one, {pairs}/two'),
    ('{pairs}/one', 'which feature is the image or text'),
    ('{owls}?label=size', "'size' is a Scalar, and a label is a ClassLabel"),
    ('{owls}?label=sice', "has no feature 'sice'; did you mean 'size'"),
    ('{owls}?labels=size', "has the unknown option 'labels'"),
  ],
)
def test_what_is_wrong_is_said(root, name, said):
  names = {'owls': _Owls.name, 'pairs': _Pairs.name}
  with pytest.raises((ValueError, FileNotFoundError), match=said.format(**names)):
    data.load('tfds:' + name.format(**names), 'train', root)


def test_files_for_tensorflow_are_refused(root, tmp_path):
  folder = shutil.copytree(root / _Owls.name / '10.0.0', tmp_path / 'records' / '1.0.0')
  info = folder / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  with pytest.raises(ValueError, match="stored as tfrecord, which .*file_format='array_record'"):
    data.load('tfds:records', 'train', tmp_path)


def test_numbers_and_sets(root):
  name = 'tfds:__owls'
  ages = data.load(f'{name}?label=age', 'train', root, 'numbers')
  assert ages.classes == ['age'] and [ages[i]['label'].tolist() for i in (0, 3)] == [[0], [0.75]]
  both = data.load(f'{name}?label=size,age', 'train', root, 'numbers')
  assert both.classes == ['size', 'age'] and both[2]['label'].tolist() == [2, 0.5]
  parts = data.load(f'{name}?label=parts', 'train', root, 'sets')
  assert parts.classes == ['beak', 'tail', 'wing']
  assert [parts[i]['label'].tolist() for i in range(3)] == [[0, 0, 0], [1, 0, 0], [1, 0, 1]]
  for options, kind, wanted in (
    ('label=age', 'classes', 'a ClassLabel'),
    ('label=age', 'sets', 'a Sequence of ClassLabel'),
    ('label=parts', 'numbers', 'of numbers'),
  ):
    with pytest.raises(ValueError, match=f'and a label is {wanted}'):
      data.load(f'{name}?{options}', 'train', root, kind)
  with pytest.raises(ValueError, match="has no feature 'weight'"):
    data.load(f'{name}?label=age,weight', 'train', root, 'numbers')


def test_rows_without_a_label(root):
  name = f'tfds:{_Some.name}'
  with pytest.raises(ValueError, match="no split 'test': .*'test' has no labels"):
    data.load(name, 'test', root)
  assert [e['label'] for e in data.load(name, 'train', root)] == [0, 1, -1, 1, 0]  # told by tasks
  kept = data.load(f'{name}?unlabelled=skip', 'train', root)
  assert [e['label'] for e in kept] == [0, 1, 1, 0] and '1 rows without' in kept.notes[0]
