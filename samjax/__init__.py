"""samjax: spatially-adaptive multilayer GAN inversion and editing (SAM, CVPR 2022) in JAX."""

from importlib.metadata import version as _version

from samjax import report
from samjax.config import InversionConfig
from samjax.errors import UserError
from samjax.pipeline import Pipeline
from samjax.results import Inversion

__version__ = _version("samjax")

__all__ = ["Inversion", "InversionConfig", "Pipeline", "UserError", "__version__", "report"]
