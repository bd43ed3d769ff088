"""Pure logic: no async, no clock, no environment, no logging, no sockets. `now`, ids and randomness are arguments.

Nothing from outside the standard library is imported here but orjson; ``tests/test_imports.py`` enforces it.
"""
