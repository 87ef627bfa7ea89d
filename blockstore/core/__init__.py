"""Decisions of this floor as plain synchronous code: no I/O, no clock, no randomness."""
