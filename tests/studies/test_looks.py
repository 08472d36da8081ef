"""The studies' figures take the looks of estimators from the one table, and can be read where they are printed."""

import re
from pathlib import Path

import pytest

from studies import table_1, table_2
from studies.landscape_figure import LOOK
from studies.shared.drawing import SIZE
from ufom_runtime.command import style

STUDIES = sorted(Path(__file__).parents[2].joinpath("studies").glob("*.py"))
FIGURES = sorted(Path(__file__).parents[2].joinpath("studies", "figures").glob("*.png"))
OWN = re.compile(
    r"#[0-9A-Fa-f]{6}\b|\bcolor=\"|\bcolor_palette\b|\bcmap=|"
    r"import .*\b(?:BLACK|BLUE|SKY|VERMILLION|ORANGE|GREEN|ROSE)\b"
)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_no_study_has_a_colour_of_its_own(path):
    assert OWN.findall(path.read_text(encoding="utf-8")) == []


def test_every_method_of_the_studies_has_a_look():
    assert {*table_1.SHOWN, *table_2.METHODS, *LOOK.values()} <= set(style.LOOKS)


def test_printed_7_inches_wide_no_type_is_smaller_than_7_points():
    sizes = [SIZE, *(size for key, size in style.SHEET.items() if key.endswith("size") and key != "lines.markersize")]
    assert 7 / style.WIDTH * min(sizes) >= 7


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_every_stored_figure_has_the_width(path):
    assert int.from_bytes(path.read_bytes()[16:20]) == style.WIDTH * style.SHEET["savefig.dpi"]  # a PNG's first field


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_no_study_has_a_size_of_type_of_its_own(path):
    text = re.sub(r"capsize=|plot\(.*\bsize=", "", path.read_text(encoding="utf-8"))  # of caps and marks
    assert re.findall(r"size=\d|\bfontsize=(?!SIZE)", text) == []
