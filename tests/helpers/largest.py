"""How large the largest tensor is that operators return."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """While it is entered, records what operators return.

    Attributes:
        numbers: how many numbers the largest storage of a tensor holds, in the tensor's dtype.
        nbytes: the bytes of the largest tensor, of a view those that it shows.
    """

    numbers = nbytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                held = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.numbers, self.nbytes = max(self.numbers, held), max(self.nbytes, tensor.nbytes)
        return result
