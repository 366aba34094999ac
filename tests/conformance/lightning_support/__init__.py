"""Every callback of Lightning and every argument of its Trainer: which of them work here, and how that is seen."""
