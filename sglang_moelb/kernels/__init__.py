"""Device code of the layer clock: tensors in, tensors out; each op has a reference beside it."""
