"""Recorded orders of samples."""

from __future__ import annotations

# (seed, rows) → the order of the rows in epochs 0, 1 and 2. Recorded once; never to be changed.
ORDERS = {
    (0, 10): [
        [0, 2, 9, 1, 8, 5, 4, 3, 6, 7],
        [5, 3, 7, 8, 2, 4, 1, 0, 6, 9],
        [6, 7, 2, 9, 1, 3, 5, 0, 4, 8],
    ],
    (1234, 10): [
        [8, 9, 7, 3, 0, 1, 4, 2, 5, 6],
        [0, 9, 5, 6, 4, 2, 8, 1, 7, 3],
        [7, 2, 6, 0, 5, 3, 8, 1, 4, 9],
    ],
    # One seed further is not one epoch further.
    (1235, 10): [
        [3, 6, 0, 9, 4, 7, 1, 5, 2, 8],
        [1, 3, 4, 5, 6, 9, 2, 8, 0, 7],
        [1, 8, 5, 4, 9, 7, 3, 6, 2, 0],
    ],
    (1234, 7): [[3, 0, 1, 4, 2, 5, 6], [0, 5, 6, 4, 2, 1, 3], [2, 6, 0, 5, 3, 1, 4]],
}
