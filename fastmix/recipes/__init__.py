"""Runnable training recipes: `python -m fastmix.recipes.NAME`."""
