"""The paper's mathematics in sympy: every module reads from top to bottom as its proof does.

Only this folder imports sympy; the numeric modules beside it are held to these derivations by the tests.
"""
