"""Measures likeness and side effects, by weight and method.

docs/evaluate.md explains the measures.
"""
