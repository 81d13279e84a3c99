"""From image files to arrays: as a viewer shows them, or one sentence with the name of the file."""

import importlib
import io
import os

import numpy as np
import pytest
from PIL import Image

from jpeft import data, tasks

decoding = importlib.import_module('jpeft.data.decode')  # the name is that of its function, too
ORIENTATION = 0x0112
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (3, 5, 3), np.uint8)

# What EXIF says of a stored image: how it must be changed to be upright (TIFF 6.0, tag 274).
UPRIGHT = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.transpose(1, 0, 2),
  6: lambda x: np.rot90(x, -1),
  7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
  8: lambda x: np.rot90(x),
}


def stored(image, kind='png', **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


@pytest.mark.parametrize('turn', UPRIGHT)
@pytest.mark.parametrize('kind', ['png', 'tiff'])
def test_photographs_are_turned_as_exif_says(turn, kind):
  exif = Image.Exif()
  exif[ORIENTATION] = turn
  file = stored(Image.fromarray(PIXELS), kind, exif=exif)
  np.testing.assert_array_equal(data.decode(file, 'x'), UPRIGHT[turn](PIXELS))
  grey = stored(Image.fromarray(PIXELS[..., 0]), kind, exif=exif)
  np.testing.assert_array_equal(data.decode(grey, 'x'), UPRIGHT[turn](PIXELS[..., :1]))


def test_training_and_prediction_read_a_photograph_alike(tmp_path):
  exif = Image.Exif()
  exif[ORIENTATION] = 6
  (tmp_path / 'a').mkdir()
  file = tmp_path / 'a' / 'photo.jpg'
  Image.fromarray(PIXELS.repeat(8, 0).repeat(8, 1)).save(file, exif=exif, quality=95)
  trained = data.load(f'folder:{tmp_path}', 'train+test')[0]['image']
  _, predicted = tasks.modality('image').read([str(file)])
  assert trained.shape == (40, 24, 3)
  np.testing.assert_array_equal(trained, predicted[0]['image'])


def test_broken_exif_data_are_no_reason_to_refuse_a_picture():
  file = stored(Image.fromarray(PIXELS), exif=b'Exif\0\0MM\0*\0\0\0\x08\0\xff' + b'\1' * 30)
  np.testing.assert_array_equal(data.decode(file, 'x'), PIXELS)


def test_modes_of_colour():
  square = Image.new('RGB', (16, 16), (200, 40, 90))
  read = lambda *args, **options: data.decode(stored(*args, **options), 'x').astype(int)
  cmyk = read(square.convert('CMYK'), 'jpeg', quality=100)
  assert abs(cmyk - (200, 40, 90)).max() <= 4
  assert abs(read(square.convert('CMYK'), 'tiff') - (200, 40, 90)).max() <= 1
  # Black counts, as in a photograph with a channel of its own for it.
  assert abs(read(Image.new('CMYK', (8, 8), (0, 0, 0, 155)), 'tiff') - 100).max() <= 1

  palette = Image.new('P', (2, 1))
  palette.putpalette([10, 20, 30, 40, 50, 60])
  palette.putdata([0, 1])
  assert read(palette).tolist() == [[[10, 20, 30], [40, 50, 60]]]
  assert read(palette, transparency=1).tolist() == [[[10, 20, 30], [255, 255, 255]]]
  grey_alpha = Image.new('LA', (1, 1), (100, 0))
  assert read(grey_alpha).tolist() == [[[255, 255, 255]]]
  assert read(Image.new('1', (2, 2), 1)).tolist() == [[[255]] * 2] * 2
  lab = read(Image.new('LAB', (1, 1), (255, 128, 128)), 'tiff')
  assert abs(lab - 255).max() <= 2


@pytest.mark.parametrize('kind', ['gif', 'webp', 'png', 'tiff'])
def test_of_an_animation_the_first_frame(kind):
  frames = [Image.new('RGB', (4, 4), colour) for colour in ('red', 'blue', 'lime')]
  file = stored(frames[0], kind, save_all=True, append_images=frames[1:])
  assert abs(data.decode(file, 'x').astype(int) - (255, 0, 0)).max() <= 4


def test_more_pixels_than_allowed(monkeypatch):
  file = stored(Image.fromarray(PIXELS))  # 15 pixels
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 7)
  with pytest.raises(ValueError, match=r'big.png has more than 14 pixels; .*MAX_IMAGE_PIXELS'):
    data.decode(file, 'big.png')
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
  assert data.decode(file, 'big.png').shape == (3, 5, 3)


def test_more_pixels_than_fit_into_memory(monkeypatch):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)  # a choice of others
  monkeypatch.setattr(decoding, 'MEMORY', 12 * 14)
  with pytest.raises(ValueError, match='big.png has 5 x 3 pixels, and at most 14 of a PNG file'):
    data.decode(stored(Image.fromarray(PIXELS)), 'big.png')
  with pytest.raises(ValueError, match='at most 8 of a WEBP file'):
    data.decode(stored(Image.fromarray(PIXELS), 'webp'), 'big.webp')


def test_formats_are_those_of_a_list(tmp_path):
  program = tmp_path / 'a.png'
  program.write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n')
  with pytest.raises(
    ValueError, match='a.png is no readable image: it does not begin as one of JPEG'
  ):
    data.decode(program, str(program))
  for kind in ('png', 'jpeg', 'gif', 'webp', 'tiff', 'bmp', 'ppm'):
    assert data.decode(stored(Image.fromarray(PIXELS), kind), 'x').shape == (3, 5, 3)
  os.mkfifo(tmp_path / 'pipe.png')
  with pytest.raises(ValueError, match='pipe.png is a pipe, socket or device, not a file'):
    data.decode(tmp_path / 'pipe.png', 'pipe.png')


def test_large_images_are_made_in_bands_like_small_ones(monkeypatch):
  pixels = RNG.integers(0, 256, (9, 7, 4), np.uint8)
  files = [stored(Image.fromarray(pixels)), stored(Image.fromarray(pixels).convert('P'))]
  files += [
    stored(Image.fromarray(pixels).convert('L')),
    stored(Image.fromarray(pixels).convert('1')),
  ]
  whole = [data.decode(file, 'x') for file in files]
  monkeypatch.setattr(decoding, '_BAND', 15)  # two rows
  for file, want in zip(files, whole, strict=True):
    np.testing.assert_array_equal(data.decode(file, 'x'), want)


@pytest.mark.parametrize('kind', ['png', 'jpeg', 'gif', 'webp', 'tiff', 'bmp'])
def test_files_cut_anywhere_are_named(kind):
  noise = Image.fromarray(RNG.integers(0, 256, (40, 40, 3), np.uint8))
  whole = stored(noise, kind)
  for part in np.linspace(0, 0.9, 10):
    with pytest.raises(ValueError, match='cut.x is no readable image'):
      data.decode(whole[: int(part * len(whole))], 'cut.x')
