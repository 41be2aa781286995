"""Reports: tables of our results beside the published ones, with the source of each number.

A number passes these modules: `load` reads results.jsonl and adds the run; `lines` names the line
of a table that it belongs to; `compare` adds the published numbers (`published`) that it stands
beside; `table` arranges numbers in tables; `render`, `as_csv` and `pictures` write them.
"""
