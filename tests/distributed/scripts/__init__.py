"""Scripts that tests start as users do: with an interpreter of their own, ``mpirun`` or a launcher."""
