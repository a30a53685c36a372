"""Run the platform: ``python -m gsa_platform``."""

import sys

from gsa_platform.cli import main

if __name__ == "__main__":
    sys.exit(main())
