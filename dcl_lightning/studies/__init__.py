"""Studies of several runs: side by side (``compare``), repeated (``repeat``) and searched (``sweep``)."""
