"""What tests compare with, of timm. No other file of theirs imports it."""

from trainables import torchvision_mended  # noqa: F401, I001  (before timm, which imports torchvision)
from timm import create_model
from timm.models.vision_transformer import Block

__all__ = ["Block", "create_model"]
