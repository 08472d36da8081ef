"""Shared set-up of the tests."""

from hypothesis import settings

settings.register_profile("ufom", deadline=None, derandomize=True)
settings.load_profile("ufom")
