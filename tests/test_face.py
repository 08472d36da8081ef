"""Random calls of the public functions: bad input is named, and nothing else comes out."""

import pytest

from tests import face


@pytest.mark.parametrize("block", range(6))
def test_nothing_but_named_errors_comes_out(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = [face.call(seed) for seed in range(50 * block, 50 * (block + 1))]
    assert not [(said, error) for said, error in calls if error]
