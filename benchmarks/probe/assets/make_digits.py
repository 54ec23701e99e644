"""Write `digits.npz`, the handwritten digits of scikit-learn.

`python -m benchmarks.probe.assets.make_digits`; the tasks need the file only, not scikit-learn.
They are the 1,797 images of 8 by 8 pixels and 17 greys of the test part of "Optical Recognition
of Handwritten Digits" (E. Alpaydin, C. Kaynak, UCI machine learning repository, 1998, CC BY 4.0).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

FILE = Path(__file__).with_name("digits.npz")


def main() -> None:
    """Write the file: `images` [1797, 8, 8] uint8 from 0 to 16, `labels` [1797] uint8."""
    digits = load_digits()
    np.savez_compressed(
        FILE, images=digits.images.astype(np.uint8), labels=digits.target.astype(np.uint8)
    )


if __name__ == "__main__":
    main()
