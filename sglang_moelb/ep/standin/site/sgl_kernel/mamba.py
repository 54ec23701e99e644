"""Names that SGLang imports from `sgl_kernel.mamba`; each raises when it is called."""

from sgl_kernel import __getattr__ as __getattr__
