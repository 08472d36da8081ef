"""CLAIMS: every numbered statement of the paper, its errata and what is added here, each decided by a function.

Importing this loads sympy; `import ufom_theory` does not import it.
"""

# each module registers its claims when imported, in this order
# isort: off
from ufom_theory.claims import gradients, theory, experiments, errata, additions

# isort: on
from ufom_theory.claims.registry import CLAIMS, Claim, Status
from ufom_theory.claims.report import chosen, markdown

__all__ = ["CLAIMS", "Claim", "Status", "chosen", "markdown"]
__all__ += [module.__name__.rpartition(".")[2] for module in (gradients, theory, experiments, errata, additions)]
