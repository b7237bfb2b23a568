"""Implements the extension's page, API, settings and infotext. Only this package imports gradio."""
