"""Graph networks that decide: one set of weights in dense, graph and numpy form."""
