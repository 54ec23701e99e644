"""Load balancing of Mixture-of-Experts serving: a plugin and a patch set over SGLang 0.5.23."""

__version__ = "0.1.0"
