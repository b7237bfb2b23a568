"""Finds and loads what is in the models folder: adapters, encoders of photos, identities."""
