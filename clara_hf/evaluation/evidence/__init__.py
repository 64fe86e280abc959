"""Claims settled over seeds: runs, effects with intervals, verdicts, one report."""
