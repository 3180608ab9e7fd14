"""Tests mirror the tree: tests/passes/test_rotate.py tests passes/rotate.py. Import shared ones as `tests.models`."""
