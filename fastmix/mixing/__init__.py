"""Ops that mix a batch with itself: a file for each."""
