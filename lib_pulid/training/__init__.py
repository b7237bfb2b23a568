"""Trains a miniature of the whole chain on a drawn world; nothing here is needed to use PuLID."""
