"""The tiny networks of `samjax.testing`."""

from samjax.testing import TINY, random_lpips, tiny_generator

__all__ = ["TINY", "random_lpips", "tiny_generator"]
