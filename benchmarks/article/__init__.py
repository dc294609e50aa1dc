"""The article's experiments: `python -m benchmarks.article all` runs them anew.

`runs` solves with the `methods`, `results` keeps the numbers, `published` has the
article's. `tables`, `claims` (by `checks`) and `figures` are functions of those, and
`report` puts them on one page.
"""
