"""The resident form of replicas: lasting copies, and experts stored low, from a placement file."""
