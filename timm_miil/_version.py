"""The version, read by setup.cfg and by cards."""

__version__ = '0.1.0'
