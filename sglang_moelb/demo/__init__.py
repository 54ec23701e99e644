"""What the demo and the end-to-end tests run on: tiny models and small inputs, made on the spot.

Importing the package makes transformers' image processors importable beside a torch without CUDA.
"""

from sglang_moelb.ep.standin.torchvision_gap import close_torchvision_gap

close_torchvision_gap()
