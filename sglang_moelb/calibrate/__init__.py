"""`moelb calibrate`: from recorded routing and a measure of importance to a placement file."""
