"""The stored costs, their page, and the parts of the benchmark that are not a clock."""

import json

import torch

from studies import estimator_costs, estimator_costs_page
from studies.estimator_costs_page import PAGE, PARTS, page, stored
from ufom_runtime.problems.quadratic import quadratic


def test_the_page_is_written_from_what_is_stored():
    assert PAGE.read_text(encoding="utf-8") == page()
    assert any(stored(part) for part in PARTS)


def test_bytes_are_foreseen():
    rows = [row for row in stored("forecast") if "refused" not in row]
    assert sum(abs(row["memory"] - 1) <= 0.1 for row in rows) >= 0.9 * len(rows)


def test_the_forecasts_that_miss_are_listed():
    row = {"problem": "x", "estimator": "FOM", "tasks": 4, "ms": 1.0, "measured ms": 2.0, "bytes": 9,
           "measured bytes": 9, "time": 0.5, "memory": 1.0}  # fmt: skip
    said = estimator_costs_page.PARTS["forecast"][1]([row, {**row, "time": 1.1}, {**row, "refused": "unsure"}])
    assert "within 15 % in 50% of them, the bytes within 10 % in 100%; 1 were refused" in said
    assert said.count("| x | FOM |") == 1


def test_the_parts_run(monkeypatch):
    """One round on a tiny problem, with a clock that says 1."""
    monkeypatch.setattr(estimator_costs, "cpu", lambda function, device=None: function() is None or 1.0)
    monkeypatch.setattr(estimator_costs, "digits_maml", lambda: quadratic(dim=2, r=3))
    monkeypatch.setattr(estimator_costs, "SIZES", (4,))
    for part in ("table", "batch"):
        rows = list(estimator_costs.PARTS[part](1))
        assert rows == json.loads(json.dumps(rows))
    assert {row["over two calls"] for row in rows} == {0.5}
    assert len(estimator_costs.batch_of(quadratic(dim=2), 3)) == 3
    assert torch.equal(estimator_costs._coins(4, estimator_costs.EXACT)[0], torch.ones(4, dtype=torch.bool))
