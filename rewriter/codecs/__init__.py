"""Codecs: what one layer stores instead of its keys and values, as a composition of stages."""

from .codec import STATE_NAMES, Codec, Params
from .spec import SideSpec, group_size_for, hadamard_order

__all__ = ["STATE_NAMES", "Codec", "Params", "SideSpec", "group_size_for", "hadamard_order"]
