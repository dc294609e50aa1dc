"""The systems that prunAdag is compared with, under the same masks and curves."""
