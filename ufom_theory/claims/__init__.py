"""CLAIMS: every numbered statement of the paper, its errata and what is added here, each decided by a function.

Importing this loads sympy; `import ufom_theory` does not import it.
"""

# Importing a module registers its claims: in this order they are listed.
# isort: off
from ufom_theory.claims import gradients, theory, experiments, errata, additions  # noqa: F401

# isort: on
from ufom_theory.claims.registry import CLAIMS, Claim, Status
from ufom_theory.claims.report import chosen, markdown

__all__ = ["CLAIMS", "Claim", "Status", "chosen", "markdown"]
