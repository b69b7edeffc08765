"""The form of results, and what was measured."""
