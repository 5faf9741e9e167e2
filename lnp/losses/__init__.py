"""Which loss is meant, how many terms it averages, and whether it is a mean over samples."""
