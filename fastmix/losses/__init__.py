"""Losses of logits and a mixed target: a file for each, and for what they share."""
