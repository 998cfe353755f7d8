"""Run a federation on this machine: ``python run_sim.py [SCENARIO] [key=value ...]``; ``--help`` says more."""

import sys

from simulations.command_line import main

if __name__ == "__main__":
    sys.exit(main())
