"""samjax: spatially-adaptive multilayer GAN inversion and editing (SAM, CVPR 2022) in JAX."""

from samjax.api import Inversion, Models, edit, invert, load_generator, load_models
from samjax.config import CATEGORIES, InversionConfig
from samjax.errors import UserError

__all__ = [
    "CATEGORIES",
    "Inversion",
    "InversionConfig",
    "Models",
    "UserError",
    "edit",
    "invert",
    "load_generator",
    "load_models",
]
