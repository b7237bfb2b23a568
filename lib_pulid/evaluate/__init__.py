"""Measures how well a person is kept and the rest left alone, over weights and methods.

What each measure means, and what it does not: docs/evaluate.md.
"""
