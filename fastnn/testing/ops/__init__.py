"""Cases and invalid calls: one module per op, named like the op, with `CASES` and `INVALID`."""
