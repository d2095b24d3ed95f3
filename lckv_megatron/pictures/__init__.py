"""Pictures of runs and of sharing maps, with matplotlib."""
