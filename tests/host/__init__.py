"""Proof inside the real programs: `make test-host WEBUI_DIR=...`, see docs/hosts.md.

models/      writes small checkpoints, PuLID files, photos; all random, a few hundred MB
helper/      a test-only extension: lets the hosts load such small models, and looks inside for us
webui.py     starts and stops a WebUI, in a data folder of its own
api.py       its HTTP API; pictures as arrays
table.py     the rows: behaviour, host, passed
rows_*.py    what is checked
"""
