"""The walk: recipe, plan, run, journal, report."""
