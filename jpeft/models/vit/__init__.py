"""ViT, DeiT and DINOv2."""
