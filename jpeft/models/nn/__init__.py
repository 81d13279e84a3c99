"""What the backbones share: layers, blocks, positions."""
