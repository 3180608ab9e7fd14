"""Codecs: what one layer stores instead of its keys and values, as a composition of stages."""

from .anchors import Anchors
from .codec import ANCHOR_NAMES, SHARED_NAMES, STATE_NAMES, Codec, Params
from .modal import MODAL
from .spec import SideSpec, group_size_for, hadamard_order

__all__ = [
    "ANCHOR_NAMES",
    "MODAL",
    "SHARED_NAMES",
    "STATE_NAMES",
    "Anchors",
    "Codec",
    "Params",
    "SideSpec",
    "group_size_for",
    "hadamard_order",
]
