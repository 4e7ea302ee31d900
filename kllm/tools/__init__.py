"""What a model may call: typed Python functions, a sandbox for its code, and the loop around the calls."""
