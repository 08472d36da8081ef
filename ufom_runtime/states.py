"""States of the inner loop: φ and, behind it, the state of the inner update, in one vector x a row, shape (n, P).

What holds, moves or differentiates states so knows one tensor, whatever the update. Without an update x is φ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ufom_runtime.inner import State
from ufom_theory import UfomError


@dataclass(frozen=True)
class Layout:
    """How φ, shape (p,), and the state of the inner update lie in one vector x, shape (P,): φ first.

    Attributes:
        p: length of φ.
        shapes: of the state's tensors, in their order.
        form: the nesting of these tensors.
    """

    p: int
    shapes: tuple[torch.Size, ...]
    form: TreeSpec

    @classmethod
    def of(cls, phi: Tensor, state: State) -> Layout:
        """The layout of a φ and a state; `UfomError` where the state is not of tensors of φ's dtype."""
        parts, form = tree_flatten(() if state is None else state)
        for part in parts:
            if not isinstance(part, Tensor) or part.dtype != phi.dtype:
                named = f"{part.dtype}" if isinstance(part, Tensor) else f"a {type(part).__name__}"
                raise UfomError(
                    f"the inner update's state holds {named}: give a tensor, or a tuple of tensors, of φ's dtype "
                    f"({phi.dtype}); give () for none"
                )
        return cls(len(phi), tuple(part.shape for part in parts), form)

    def join(self, phi: Tensor, state: State) -> Tensor:
        """x from φ and the state; `UfomError` where they have another form than at the start."""
        if (found := Layout.of(phi, state)) != self:
            raise UfomError(
                f"the inner update returned φ and a state of shapes {(found.p,)}, {[*map(tuple, found.shapes)]}, but "
                f"they began with {(self.p,)}, {[*map(tuple, self.shapes)]}: keep the form that init gives"
            )
        parts, _ = tree_flatten(() if state is None else state)
        return torch.cat([phi, *(part.reshape(-1) for part in parts)]) if parts else phi

    def split(self, x: Tensor) -> tuple[Tensor, State]:
        """φ and the state from x."""
        phi, *parts = torch.split(x, [self.p, *(shape.numel() for shape in self.shapes)])
        state = tree_unflatten([part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)], self.form)
        return phi, state
