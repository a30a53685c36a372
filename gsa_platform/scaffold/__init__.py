"""``plugins new``: an installable plugin package to start from."""

from gsa_platform.scaffold.new import new, write_package

__all__ = ["new", "write_package"]
