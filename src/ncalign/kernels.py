"""The public name of :mod:`ncalign.objectives.kernels`: which candidates enter a loss."""

from ncalign.objectives import kernels
from ncalign.objectives.kernels import *

__all__: list[str] = []
__all__ += kernels.__all__
