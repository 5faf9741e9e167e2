"""Reading runs that were recorded, and comparing them."""
