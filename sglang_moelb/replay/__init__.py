"""Replay of a trace: what our levers, and peers' rules, would have made of the very same passes."""
