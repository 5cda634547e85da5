"""A run's table and page, those of many runs, or what an adapter in PEFT's layout has learned: `python -m report --help`."""

from run import parallel
from report.runs import main

parallel.run(main)
