"""One look for every figure: an estimator has the same colour, mark and dashes everywhere. Plain data, no import.

Colours are Okabe and Ito's, told apart by the colour-blind; they say what the mean is against ∇M: black is exact, the
blues and rose are unbiased by a coin, orange is the released code's rule, red is biased, green follows another
objective. Within a colour, marks and dashes differ, so that a figure printed in grey can be read. V² looks as the exact
gradient whose moment it is, D² as FOM. Grey is for lines of reference, and what is not an estimator (a task, a step
size, a reading of the theory) has a shade of purple.
"""

from typing import Any

BLACK, BLUE, SKY, VERMILLION = "#000000", "#0072B2", "#56B4E9", "#D55E00"
ORANGE, GREEN, ROSE, GREY, SHADES = "#E69F00", "#009E73", "#CC79A7", "#777777", "Purples"

LOOKS: dict[str, dict[str, Any]] = {
    "exact": {"color": BLACK, "marker": "s", "ls": "-"},
    "exact, checkpoints": {"color": BLACK, "marker": "d", "ls": "--"},
    "exact, all states": {"color": BLACK, "marker": "D", "ls": "-."},
    "forward": {"color": BLACK, "marker": ">", "ls": (0, (1, 1))},
    "reversible": {"color": BLACK, "marker": "<", "ls": (0, (5, 1, 1, 1, 1, 1))},
    "UFOM": {"color": BLUE, "marker": "o", "ls": "-"},
    "UFOM, implicit": {"color": BLUE, "marker": "2", "ls": "-."},
    "step rule": {"color": ROSE, "marker": "3", "ls": (0, (1, 1))},
    "telescoping": {"color": BLUE, "marker": "h", "ls": "--"},
    "adaptive": {"color": SKY, "marker": "P", "ls": "-"},
    "adaptive ×0.1": {"color": SKY, "marker": "p", "ls": "--"},
    "released": {"color": ORANGE, "marker": "X", "ls": "-"},
    "released ×0.1": {"color": ORANGE, "marker": "x", "ls": "--"},
    "FOM": {"color": VERMILLION, "marker": "^", "ls": ":"},
    "truncated": {"color": VERMILLION, "marker": "v", "ls": "--"},
    "implicit-cg": {"color": VERMILLION, "marker": "8", "ls": "-"},
    "implicit-neumann": {"color": VERMILLION, "marker": "H", "ls": "-."},
    "guided evolution": {"color": VERMILLION, "marker": "1", "ls": (0, (3, 1, 1, 1))},
    "Reptile": {"color": GREEN, "marker": "*", "ls": "-"},
    "evolution": {"color": GREEN, "marker": "+", "ls": "--"},
}
"""Keyword arguments of `axes.plot`, by estimator."""

WIDTH = 8  # inches, of every figure of the studies: printed 7 inches wide, type of 8 points is 7 points high

SHEET = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "lines.markeredgewidth": 1.2,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
    "svg.hashsalt": "ufom",
}
"""For `matplotlib.rc_context`; the family has DejaVu, matplotlib's own, so that every machine draws the same."""
