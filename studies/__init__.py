"""One file a question: `measure(config) → table`, `judge(table) → verdicts`, `draw(table) → figure`."""
