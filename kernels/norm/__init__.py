"""Layer norm, group norm and GELU: one pass over memory each."""
