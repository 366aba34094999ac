"""Programs that tests run on workers: a function for each, which checks its own results on its own worker."""
