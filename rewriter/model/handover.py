"""What goes with a tensor from the one who returns it to the one who is given it, when the code between hands on tensors alone.

A cache returns keys and values to a model's code, which calls an attention function of transformers with them; a mask is made where
the model is called and comes to every layer. What else there is to say is left here under the tensor itself: found by identity
alone, never by equality or by memory, and gone with it. A view, a copy or a conversion is another tensor and finds nothing.

Source     ours
Differs    from an attribute of the tensor: who may read it is who was given the same `Handover`
"""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Handover"]

T = TypeVar("T")


class Handover(Generic[T]):
    """One kind of thing left with tensors, for those who import it. What is left must not itself hold the tensor."""

    def __init__(self) -> None:
        self._left = WeakTensorKeyDictionary()

    def leave(self, tensor: Tensor, what: T) -> None:
        """From now on `what` goes with this tensor; what was left with it before is forgotten."""
        self._left[tensor] = what

    def found(self, tensor: Tensor | None) -> T | None:
        """What was left with this very tensor, or None."""
        return None if tensor is None else self._left.get(tensor)

    def __len__(self) -> int:
        """Tensors that live and have something left with them."""
        return len(self._left)
