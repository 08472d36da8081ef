"""The benchmark's sides do the same work; no time is tested."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from studies import toy_benchmark as benchmark
from ufom_runtime import chains


def test_all_sides_agree_on_every_piece(monkeypatch):
    monkeypatch.setattr(chains, "_library", lambda: (chains._advance, chains._gradient_sq))
    monkeypatch.setattr(benchmark, "CHAINS", 3000)
    monkeypatch.setattr(benchmark, "STEPS", 3)
    monkeypatch.setattr(benchmark, "PAIR", replace(benchmark.PAIR, alpha=0.3, A=15.0))
    table = benchmark.measure_toy(rounds=2)
    assert (table["per second"] > 0).all()
    inside, bend, beyond = benchmark._pieces(np.linspace(-50, 50, 1000))
    assert inside.any()
    assert bend.any()
    assert beyond.any()
