"""The optimiser is in `detr_nb.optimizer` now; its names are found here, with a warning, for one release."""

from .notation import forward_names

__getattr__ = forward_names(__name__)
