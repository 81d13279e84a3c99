"""Methods that reparametrise weights."""
