"""Runs every backend in a process of its own."""
