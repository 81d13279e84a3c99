"""What the transforms of images and texts take for granted, known without their packages."""

# The side that an image is resized to before a crop, over the side of the crop.
MARGIN = 256 / 224
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# {name: (mean, deviation) of the colours of pixels from 0 to 1} that images are brought to.
PIXELS = {
  'imagenet': (IMAGENET_MEAN, IMAGENET_STD),
  'half': ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
  'none': ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
# How tokenizers write their padding.
PADS = ('[PAD]', '<pad>', '<|pad|>', '<|padding|>')
