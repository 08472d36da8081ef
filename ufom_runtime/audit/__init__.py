"""Whether given hypergradient code is exact, first-order or wrong."""
