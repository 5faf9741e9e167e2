"""Estimators of the kernel's trace and of the population's values."""
