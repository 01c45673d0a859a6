"""From the command line to a run that can start: the user's data, the schedule, checks, processes."""
