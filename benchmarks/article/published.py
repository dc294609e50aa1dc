"""Figures that the article gives, to be shown beside the measured ones.

From M. Porcelli, G. Seraghiti, Ph. L. Toint, prunAdag: an adaptive pruning-aware
gradient method, Comput. Optim. Appl. 93 (2026) 85-119: tables 2 and 4. Sparsities are
shares of the components; what could not be read with certainty is left out. The figures
of table 3 (SPARCO) are not at hand.
"""

# What a table says: (problem, sparsity) -> method -> figure.
Cells = dict[tuple[str, float], dict[str, float]]

# Read from a plot or rounded to a power of ten.
APPROXIMATE = {("A1", 0.3, "v3"), ("A2", 0.2, "v3"), ("A2", 0.4, "v3")}


def _cells(methods: tuple[str, ...], text: str) -> Cells:
    """Parses lines of a problem, the percentage and a figure a method, - for none."""
    cells: Cells = {}
    for line in text.strip().splitlines():
        problem, percent, *figures = line.split()
        pairs = zip(methods, figures, strict=True)
        cells[problem, int(percent) / 100] = {
            method: float(figure) for method, figure in pairs if figure != "-"
        }
    return cells


COLUMNS = ("v1", "v2", "v3", "v4", "FW1", "FW2", "Adagrad")

# Mean rho over 20 runs.
TABLE_2 = _cells(
    COLUMNS,
    """
    A1 10  -     1.39   9.4e-10  0.88    6.34    8.92  670
    A1 20  0.01  1.39   9.7e-10  0.88    6.34    25.67 1.7e3
    A1 30  0.21  1.38   5e-5     0.88    6.34    47.2  3.0e3
    A1 40  1.69  1.36   0.17     0.88    6.43    79.1  4.4e3
    A1 50  12.9  1.35   9.73     0.89    7.52    109   6.0e3
    A2 20  -     5.9e-4 1e-9     1.1e-3  4.5e-3  0.39  0.61
    A2 40  0.02  6.0e-4 1e-6     1.1e-3  5.4e-3  0.40  1.72
    A2 60  0.20  0.12   0.03     2.2e-3  0.14    0.42  3.57
    """,
)

# Mean test accuracy in percent over 20 runs.
TABLE_4 = _cells(
    COLUMNS,
    """
    MNIST    75 81.90 81.91 80.60 80.46 83.65 81.85 80.15
    MNIST    85 80.43 80.53 80.35 80.12 82.80 80.83 77.32
    MNIST    90 78.02 78.15 78.83 78.85 81.51 79.02 75.68
    MNIST    95 72.26 72.38 74.11 73.92 76.60 72.48 66.06
    REGED0   70 96.36 95.93 96.36 96.33 97.33 97.33 96.20
    REGED0   85 96.76 96.10 96.96 96.60 97.33 97.46 93.06
    REGED0   90 95.90 95.67 84.50 96.40 97.33 98.60 65.20
    A9A      65 81.65 82.16 81.87 81.97 83.07 83.33 76.93
    A9A      75 80.68 80.86 80.77 80.22 83.40 83.03 71.25
    A9A      85 75.83 75.95 76.20 76.23 82.36 81.60 72.76
    MOLECULE 65 79.30 78.77 78.70 78.39 78.53 79.54 65.00
    MOLECULE 75 76.11 76.22 78.04 78.28 78.32 79.12 62.86
    MOLECULE 85 71.01 70.83 75.69 76.53 76.50 73.00 60.73
    GISETTE  75 93.75 94.50 93.68 94.51 94.66 94.30 94.13
    GISETTE  85 93.40 94.03 93.10 94.05 94.68 94.35 92.45
    GISETTE  95 87.13 90.86 83.73 89.53 91.81 90.20 83.70
    """,
)

# The article's name of a problem where ours is another. Its MOLECULE is taken to be
# Musk, version 1. GISETTE is not among our problems: gisette_like is other data.
NAMED = {"Musk1": "MOLECULE", "MNIST 30:70": "MNIST"}
