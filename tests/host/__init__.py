"""Proof inside the real programs: `make test-host WEBUI_DIR=...`, see docs/hosts.md.

models/      writes small checkpoints, PuLID files, photos; all random, a few hundred MB
helper/      a test-only extension: lets the hosts load such small models, and looks inside for us
webui.py     starts and stops a WebUI, in a data folder of its own
api.py       its HTTP API; images as arrays
table.py     the rows: behavior, host, passed
rows_*.py    what is checked

Not pytest: a row is a line of the table in docs/hosts.md, with its sentence and what was seen, and rows of a group
share one start of the program, which takes minutes; groups differ in its flags. With pytest about 70 lines of
table.py would go, and as many come back: fixtures for each start, and a hook that collects sentences, results and
what was seen.
"""
