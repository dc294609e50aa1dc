"""Leaf and dtype questions, checks and tables: one answer for every module."""
