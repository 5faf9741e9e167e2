"""The Python state of a model: where objects hold things, and how it is put back."""
