"""Few bits: codes, tables, operations and residuals that keep less than JAX would."""
