"""What a backend owes the core: the linearization, its options, and how a model finds its backend."""
