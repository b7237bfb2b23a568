import sys

from lib_pulid.cli import main

sys.exit(main())
