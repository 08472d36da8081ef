"""One look for every figure, the page included."""

import re
from importlib.resources import files

from matplotlib import rc_context
from matplotlib.figure import Figure

from ufom_runtime.command import style


def test_no_two_estimators_look_alike_even_in_grey():
    assert len({look["marker"] for look in style.LOOKS.values()}) == len(style.LOOKS)
    same_colour: dict = {}
    for look in style.LOOKS.values():
        same_colour.setdefault(look["color"], []).append(look["ls"])
    assert all(len(set(dashes)) == len(dashes) for dashes in same_colour.values())


def test_the_looks_and_the_sheet_are_matplotlibs():
    with rc_context(style.SHEET):
        figure = Figure()
        axes = figure.subplots()
        for name, look in style.LOOKS.items():
            axes.plot([0, 1], [0, 1], **look, label=name)
        legend = axes.legend()
        figure.canvas.draw()
    assert [text.get_text() for text in legend.get_texts()] == list(style.LOOKS)


def test_the_page_has_the_same_colours():
    page = files("ufom_runtime.command").joinpath("explorer.html").read_text(encoding="utf-8")
    light = dict(re.findall(r"--(\w+): (#\w+);", page.split("@media")[0]))
    assert light["curve"] == style.LOOKS["UFOM"]["color"]
    assert light["fom"] == style.LOOKS["FOM"]["color"]
