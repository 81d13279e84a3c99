"""What the transforms of images and texts take for granted, known without their packages."""

# The side that an image is resized to before a crop, over the side of the crop.
MARGIN = 256 / 224
# How tokenizers write their padding.
PADS = ('[PAD]', '<pad>', '<|pad|>', '<|padding|>')
