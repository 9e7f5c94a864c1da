"""Where tokens lie on the picture: the grid of rows and columns behind the prefix tokens."""
from fractions import Fraction

__all__ = ['find_grid']


def find_grid(positions: int, image_size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of positions that one stride lays over a picture.

    A stride s gives (H / s, W / s), both rounded down, or both up where the picture is padded. At most one factor
    pair of the positions is of the first kind; it is looked for before the second.

    Args:
        positions: Number of positions.
        image_size: Height and width of the picture, in pixels.

    Returns:
        (rows, columns), or None if no stride gives as many positions.
    """
    pairs = [(rows, positions // rows) for rows in range(1, positions + 1) if positions % rows == 0]
    for low, high in ((0, 1), (-1, 0)):  # half-open ranges of 1 / s: rounded down, rounded up
        for pair in pairs:
            least, most = zip(*(
                (Fraction(count + low, side), Fraction(count + high, side)) for count, side in zip(pair, image_size)))
            if max(least) < min(most):
                return pair
    return None
