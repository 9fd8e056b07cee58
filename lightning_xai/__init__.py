"""Train CLIP-like dual encoders and watch which words they match with which image regions.

Importing the package loads no torch: public names live in its subpackages, from `lightning_xai.data` to
`lightning_xai.training`.
"""

from importlib.metadata import version

__all__ = ["__version__"]
__version__ = version("lightning_xai")
