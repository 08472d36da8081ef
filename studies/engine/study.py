"""The protocol of a study: what every study gives, as one typed object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from studies.shared.verdicts import Verdict

if TYPE_CHECKING:
    import pandas as pd
    from _typeshed import DataclassInstance
    from matplotlib.figure import Figure

    from studies.engine.sweep import Store

    Config = TypeVar("Config", bound=DataclassInstance)
else:
    Config = TypeVar("Config")
Result = TypeVar("Result")

Progress = Callable[[float], object]


def of_table(function: Callable[[pd.DataFrame], Result]) -> Callable[[pd.DataFrame, Any], Result]:
    """For a study whose rows say all that is to be known of them: a function of the table alone."""
    return lambda table, config: function(table)


def silent(share: float) -> None:
    """No progress bar."""


@dataclass(frozen=True)
class Study(Generic[Config]):
    """A question, and what answers it; `studies/template.py` is one to copy.

    Only `measure` computes. The other functions read the table and the configuration, so that a stored table can be
    judged and drawn again on another day.

    Attributes:
        question: a sentence.
        sizes: configurations by name: "quick" (seconds, for the tests), "standard", and perhaps others, as "paper".
        measure: from a configuration, the store of its cells and where to report progress, to a table: one row for each
            thing measured. What the configuration says is not repeated in the rows.
        judge: what was predicted, what was measured, and whether they agree.
        draw: the figure.
        caption: what the figure shows, with its sizes.
        answer: the answer to the question, a sentence.
        jobs: local processes that run the cells, where the command line does not say otherwise; 0 for a study that
            keeps no cells.
    """

    question: str
    sizes: Mapping[str, Config]
    measure: Callable[[Config, Store, Progress], pd.DataFrame]
    judge: Callable[[pd.DataFrame, Config], list[Verdict]]
    draw: Callable[[pd.DataFrame, Config], Figure]
    caption: Callable[[pd.DataFrame, Config], str]
    answer: Callable[[pd.DataFrame, Config], str]
    jobs: int = 2
