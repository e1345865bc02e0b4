"""`moor evidence vectors`: folders of evidence with a `case.json` that says what must come out, run and compared.

`case` reads the schema, `families` runs one case each, `classes` says which code belongs to which class, `compare`
decides what matches. Nothing here verifies anything itself: each family calls the rooms that an application calls.
"""
