"""A/B of serving: the same requests to two or more SGLang servers, compared in one report."""
